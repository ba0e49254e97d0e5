"""`fivestep explain`: every number of its facts beside an independent plain loop, every number of its text a fact."""

import ast
import math
import operator
import re
from dataclasses import fields, is_dataclass
from itertools import count, islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fivestep.learn.explain_facts import ROWS, SEGMENTS, WINDOWS
from fivestep.learn.explain_facts import plain as shown
from fivestep.learn.explain_measure import explained, measured
from fivestep.learn.explain_observe import observed
from fivestep.learn.explain_text import STAGES, in_ascii, lines
from fivestep.run.build import build_job
from fivestep.run.config import load_config

VERSE = "the fox and the hen ran to the barn and sat in the hay until the sun was low again "
SMALL = {"n_embd": 16, "n_hidden": 12, "n_layer": 1, "n_head": 2}
JOBS = {  # name -> recipe, options, step
    "bigram": ("bigram", {"max_iters": 9}, 0),
    "bigram-later": ("bigram", {"max_iters": 9}, 3),
    "gpt": ("gpt-chars", {"block_size": 12, "batch_size": 4, "max_iters": 9, **SMALL}, 2),
    "gpt-accumulated": ("gpt-chars", {"block_size": 8, "batch_size": 6, "accumulate": 3, "max_iters": 9, **SMALL}, 1),
    "rnn": ("rnn-words", {"bptt": 5, "batch_size": 4, "epochs": 1, **SMALL}, 2),
    "rnn-first": ("rnn-words", {"bptt": 5, "batch_size": 4, "epochs": 1, "cell": "gru", **SMALL}, 0),
    "rnn-variable": (
        "rnn-words",
        {
            "bptt": 12,
            "variable_bptt": True,
            "batch_size": 2,
            "epochs": 1,
            "optimizer": "adamw",
            "learning_rate": 0.01,
            **SMALL,
        },
        1,
    ),
    "transformer": ("transformer-words", {"bptt": 5, "batch_size": 4, "epochs": 1, **SMALL}, 1),
    "regression": ("regression", {"n_hidden": 8}, 2),
    "momentum": ("regression", {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "n_hidden": 8}, 2),
    "adam": ("regression", {"optimizer": "adam", "weight_decay": 0.1, "n_hidden": 8}, 1),
    "digits": ("digits", {"n_hidden": 16}, 1),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text without digits: a number in an explanation of it is one of the explanation's own."""
    path = tmp_path_factory.mktemp("text") / "verse.txt"
    path.write_text((VERSE * 3 + "\n") * 4)
    return path


def configured(name, text, **more):
    recipe, options, step = JOBS[name]
    if recipe == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = {} if recipe in ("regression", "digits") else {"data": [str(text)]}
    return load_config(
        recipe, {"graph": "off", "ngrams": 2 if recipe == "gpt-chars" else 1, **data, **options, **more}
    ), step


@pytest.fixture(scope="module", params=JOBS)
def case(request, text, tmp_path_factory):
    """(facts, plain): what is explained, and the same step from a loop written out below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIVESTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        config, step = configured(request.param, text)
        facts = explained(config, build_job(config), step)
        return facts, Plain(config, step)


class Plain:
    """A loop of its own over the same objects: only torch, and the numbers of step `step + 1` kept."""

    def __init__(self, config, step):
        job = build_job(config)
        self.config, self.model, self.job = config, job.model, job
        self.names = [name for name, _ in job.model.named_parameters()]
        windows, hidden = self.windows(), None
        job.model.train()
        for i in range(step + 2):
            window, begins = next(windows)
            hidden = None if begins else hidden
            if i == step:
                self.window, self.hidden, self.random = window, hidden, torch.get_rng_state()
                self.before = self.weights()
            if i == step + 1:
                left = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
                random = torch.get_rng_state()
                self.learn(window, hidden)  # on top of what the last step left
                self.without = self.gradients()
                torch.set_rng_state(random)
            for optimizer in job.optimizers:
                optimizer.zero_grad(set_to_none=True)
            after = self.learn(window, hidden)
            raw = self.gradients()
            if i == step + 1:
                self.following = raw
                self.left = {n: g for n, g in zip(self.names, left, strict=True) if g is not None}
                break
            if config.clip_norm:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            for optimizer in job.optimizers:
                for group in optimizer.param_groups:
                    base = group.setdefault("initial_lr", group["lr"])
                    group["lr"] = base * (job.scheduler(i) if job.scheduler else 1.0)
                    if config.variable_bptt:
                        group["lr"] *= window[0][0].shape[0] / config.bptt
                optimizer.step()
            if i == step:
                self.raw, self.hidden_after, self.loss = raw, after, self.mean
                self.clipped, self.after = self.gradients(), self.weights()
                self.norm = float(norm) if config.clip_norm else whole(raw)
                self.rates = [group["lr"] for optimizer in job.optimizers for group in optimizer.param_groups]
                torch_state, now = torch.get_rng_state(), self.random
                torch.set_rng_state(now)
                with torch.no_grad():
                    self.loss_after = self.forward(window, self.hidden, self.model)[0]
                torch.set_rng_state(torch_state)
            hidden = after

    def windows(self):
        """What each step reads, epoch after epoch, and whether an epoch begins with it."""
        for epoch in count():
            stream, begins = self.job.data.train.epoch(epoch), True
            while window := list(islice(stream, self.config.accumulate)):
                yield window, begins
                begins = False

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def forward(self, window, hidden, model, dtype=torch.float32):
        """The mean loss over a window, the outputs of each batch [rows, width], their targets, the hidden state."""
        losses, outputs, targets = [], [], []
        for x, y in window:
            if x.is_floating_point():
                x = x.to(dtype)
            if y.is_floating_point():
                y = y.to(dtype)
            if self.config.model == "rnn":
                out, hidden = model(x, hidden)
                hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
            else:
                out = model(x)
            if y.is_floating_point():
                losses.append(((out - y) ** 2).mean())
            else:
                out, y = out.reshape(-1, out.shape[-1]), y.reshape(-1)
                losses.append(F.cross_entropy(out, y))
            outputs.append(out.detach())
            targets.append(y)
        counts = [y.numel() for y in targets]
        self.mean = sum(float(loss.detach()) * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
        self.parts = [loss * (n / sum(counts)) for loss, n in zip(losses, counts, strict=True)]
        return self.mean, outputs, targets, hidden

    def learn(self, window, hidden):
        *_, hidden = self.forward(window, hidden, self.model)
        for part in self.parts:
            part.backward()
        return hidden

    def at_the_step(self, dtype=torch.float32, change=None):
        """`forward` of the shown step from its own weights and random state, perhaps with one weight moved."""
        now = torch.get_rng_state()
        weights = {name: value.clone().to(dtype) for name, value in self.before.items()}
        if change:
            name, index, by = change
            weights[name][index] += by
        model = build_job(self.config).model.to(dtype)
        model.train()
        model.load_state_dict(weights, strict=False)
        hidden = self.hidden
        if hidden is not None:
            hidden = tuple(h.to(dtype) for h in hidden) if isinstance(hidden, tuple) else hidden.to(dtype)
        torch.set_rng_state(self.random)
        with torch.no_grad():
            found = self.forward(self.window, hidden, model, dtype)
        torch.set_rng_state(now)
        return found


def whole(grads):
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values()))


def close(a, b, relative=1e-5, absolute=1e-9):
    assert a == pytest.approx(b, rel=relative, abs=absolute), (a, b)


# --- the facts ---


def test_parameters_and_groups(case):
    facts, plain = case
    assert [(one.name, one.sizes, one.count) for one in facts.parameters.layers] == [
        (name, tuple(p.shape), p.numel()) for name, p in plain.before.items()
    ]
    assert facts.parameters.count == facts.parameters.trained == sum(p.numel() for p in plain.before.values())
    for one in facts.parameters.layers:
        close(one.weight_norm, float(plain.before[one.name].double().norm()))
        close(one.gradient_norm, float(plain.raw[one.name].double().norm()), 1e-4)
        moved = plain.after[one.name].double() - plain.before[one.name].double()
        close(one.update_norm, float(moved.norm()))
    groups = [(type(o).__name__, g) for o in plain.job.optimizers for g in o.param_groups]
    assert [one.optimizer for one in facts.groups] == [kind for kind, _ in groups]
    for one, (_, group), rate in zip(facts.groups, groups, plain.rates, strict=True):
        assert one.options["lr"] == pytest.approx(rate, rel=1e-12)
        assert one.options["weight_decay"] == group["weight_decay"]
        assert one.count == sum(p.numel() for p in group["params"]) and one.tensors == len(group["params"])
        if "betas" in group:
            assert (one.options["beta1"], one.options["beta2"]) == group["betas"]
            assert one.kept == ["exp_avg", "exp_avg_sq"]
    units = sum(y.shape[0] if facts.workload == ROWS else y.numel() for _, y in plain.window)
    assert facts.parameters.units_per_step == units


def test_loop(case):
    facts, plain = case
    loop, config = facts.loop, plain.config
    per_epoch = len(plain.job.data.train)
    assert loop.planned == (config.max_iters or config.epochs * -(-per_epoch // config.accumulate))
    assert (loop.epoch, loop.per_epoch, loop.micro_batches) == (1, per_epoch, config.accumulate)
    assert loop.position == loop.before * config.accumulate
    assert loop.rate == pytest.approx(plain.rates[0], rel=1e-12)


def test_batch(case):
    facts, plain = case
    (x, y), one = plain.window[0], facts.batch
    assert [shape.sizes for shape in one.shapes] == [tuple(x.shape), tuple(y.shape)]
    assert one.count == sum(y.numel() for _, y in plain.window)
    _, outputs, targets, _ = plain.at_the_step()
    if facts.workload == ROWS:
        for i, row in enumerate(one.examples):
            assert row.features == x[i].tolist() and row.label == y[i].reshape(-1).tolist()
            assert row.outputs == pytest.approx(outputs[0][i].tolist(), rel=1e-5, abs=1e-7)
            close(row.loss, loss_of(outputs[0][i], y[i]))
        return
    assert one.shapes[0].axes == {WINDOWS: ("batch", "time"), SEGMENTS: ("seq_len", "batch_size")}[facts.workload]
    vocabulary = plain.job.data.tokenizer.vocabulary
    y = y.view(x.shape)
    for i, row in enumerate(one.text):
        ids, wanted = (x[i], y[i]) if facts.workload == WINDOWS else (x[:, i], y[:, i])
        assert row.sees == [vocabulary[j] for j in ids] and row.predicts == [vocabulary[j] for j in wanted]
        assert row.sees[1:] == row.predicts[:-1]
        for t, value in enumerate(row.losses):
            at = i * x.shape[1] + t if facts.workload == WINDOWS else t * x.shape[1] + i
            close(value, loss_of(outputs[0][at], targets[0][at]), 1e-4, 1e-6)
    tokens = plain.job.data.train.tokens
    assert [vocabulary[j] for j in tokens[one.offset : one.offset + len(row.sees)]] == one.text[0].sees


def loss_of(output, target):
    """One loss in Python's floats."""
    if target.is_floating_point():
        return sum((a - b) ** 2 for a, b in zip(output.tolist(), target.tolist(), strict=True)) / len(output)
    top = max(output.tolist())
    return top + math.log(sum(math.exp(one - top) for one in output.tolist())) - output.tolist()[int(target)]


def test_hidden_state(case):
    facts, plain = case
    if plain.config.model != "rnn":
        assert facts.batch.carry is None
        return
    carry, after = facts.batch.carry, plain.hidden_after
    after = list(after) if isinstance(after, tuple) else [after]
    assert [one.sizes for one in carry.shapes] == [tuple(h.shape) for h in after]
    assert carry.norms_after == pytest.approx([float(h.double().norm()) for h in after], rel=1e-5)
    assert carry.fresh == (facts.loop.before == 0)
    if not carry.fresh:
        before = list(plain.hidden) if isinstance(plain.hidden, tuple) else [plain.hidden]
        assert carry.norms_before == pytest.approx([float(h.double().norm()) for h in before], rel=1e-5)
        assert carry.ended_with == facts.batch.text[0].sees[0]


def test_forward(case):
    facts, plain = case
    _, outputs, targets, _ = plain.at_the_step()
    out, one = outputs[0], facts.forward
    assert math.prod(one.output.sizes) == out.numel() and one.output.sizes[-1] == out.shape[-1]
    assert one.path and one.path[-1][2].sizes == one.output.sizes
    if facts.loss.classes is None:
        assert one.guesses == [] and one.heat is None
        return
    x = plain.window[0][0]
    length = x.shape[0 if facts.workload == SEGMENTS else 1] if facts.workload != ROWS else min(12, len(x))
    stride = {WINDOWS: 1, SEGMENTS: x.shape[1], ROWS: 1}[facts.workload]
    names = plain.job.data.tokenizer.vocabulary if plain.job.data.tokenizer else [str(i) for i in range(10)]
    for guess, t in zip(one.guesses, (0, length // 2, length - 1), strict=True):
        row, target = out[t * stride].tolist(), int(targets[0][t * stride])
        total = sum(math.exp(value) for value in row)
        close(guess.log_sum, math.log(total))
        ordered = sorted(range(len(row)), key=lambda i: -row[i])
        assert sorted(one.logit for one in guess.likeliest) == pytest.approx(sorted(row[i] for i in ordered[:5]))
        for likely in (*guess.likeliest, guess.target):
            assert likely.logit == pytest.approx(row[names.index(likely.token)], rel=1e-5)
            close(likely.probability, math.exp(likely.logit) / total)
        assert guess.target.token == names[target]
        assert guess.rank == 1 + sum(value > row[target] for value in row)
    for t, (logits, wanted) in enumerate(zip(one.heat.logits, one.heat.targets, strict=True)):
        picked = [out[t * stride, names.index(token)].item() for token in one.heat.tokens]
        assert logits == pytest.approx(picked, rel=1e-5, abs=1e-7)
        assert one.heat.tokens[wanted] == names[int(targets[0][t * stride])]


def test_loss(case):
    facts, plain = case
    _, outputs, targets, _ = plain.at_the_step()
    if facts.loss.classes is None:
        losses = ((outputs[0].double() - targets[0].double()) ** 2).flatten().tolist()
        labels = targets[0].flatten().tolist()
        centre = sum(labels) / len(labels)
        close(facts.loss.baseline, sum((one - centre) ** 2 for one in labels) / len(labels))
    else:
        losses = [
            loss_of(o, t) for out, of in zip(outputs, targets, strict=True) for o, t in zip(out, of, strict=True)
        ]
        assert facts.loss.classes == outputs[0].shape[-1] and facts.loss.baseline == math.log(facts.loss.classes)
    one = facts.loss
    assert one.count == len(losses) == facts.batch.count
    close(one.mean, sum(losses) / len(losses))
    close(one.smallest, min(losses), 1e-4, 1e-7)
    close(one.largest, max(losses))
    close(one.step, plain.loss)
    close(one.step, one.mean)


def test_gradients_and_finite_differences(case):
    facts, plain = case
    one = facts.gradients
    close(one.norm, plain.norm, 1e-4)
    assert len(one.slopes) == 3 and one.unused == []
    for slope in one.slopes:
        close(slope.weight, float(plain.before[slope.name][slope.index]))
        close(slope.gradient, float(plain.raw[slope.name][slope.index]), 1e-5)
        losses = [plain.at_the_step(torch.float64, (slope.name, slope.index, by))[0] for by in (slope.h, -slope.h)]
        close(slope.loss_above, losses[0], 1e-12)
        close(slope.loss_below, losses[1], 1e-12)
        assert slope.difference == (slope.loss_above - slope.loss_below) / (2 * slope.h)
        wide = max(abs(slope.gradient), abs(slope.difference))
        assert slope.relative == abs(slope.gradient - slope.difference) / wide <= 1e-4
        assert slope.agrees
    clip = plain.config.clip_norm
    assert one.factor == (min(1.0, clip / (one.norm + 1e-6)) if clip else 1.0)


def test_update(case):
    facts, plain = case
    close(facts.update.loss_after, plain.loss_after, 1e-5)
    kinds = [type(optimizer).__name__ for optimizer in plain.job.optimizers]
    assert [one.optimizer for one in facts.update.arithmetic] == kinds
    for one in facts.update.arithmetic:
        assert one.equal
        assert one.found == pytest.approx(float(plain.after[one.name][one.index]), rel=1e-5)
        assert one.inputs["w"] == pytest.approx(float(plain.before[one.name][one.index]), rel=1e-4, abs=1e-7)
        assert one.inputs["g"] == pytest.approx(float(plain.clipped[one.name][one.index]), rel=1e-5)
        for term in one.terms:
            if term.found is not None:
                assert term.found == pytest.approx(term.value, rel=2e-6, abs=1e-12)
            if term.worked:
                assert evaluated(term.worked) == pytest.approx(term.value, rel=1e-6)
        assert one.updates == facts.loop.before


def test_reset(case):
    facts, plain = case
    one = facts.reset
    assert len(one.kept) == 3
    for kept in one.kept:
        assert kept.now == pytest.approx(float(plain.left[kept.name][kept.index]), rel=1e-5)
        assert kept.following == pytest.approx(float(plain.following[kept.name][kept.index]), rel=1e-5, abs=1e-5)
        assert kept.without == pytest.approx(kept.now + kept.following, rel=1e-4, abs=1e-7)
        assert kept.without == pytest.approx(float(plain.without[kept.name][kept.index]), rel=1e-5, abs=1e-5)
    close(one.now, whole(plain.left), 1e-5)
    close(one.following, whole(plain.following), 1e-5)
    close(one.without, whole(plain.without), 1e-5)
    along = sum(float((plain.following[n].double() * plain.without[n].double()).sum()) for n in plain.without)
    close(one.cosine, along / (whole(plain.following) * whole(plain.without)), 1e-5)


@pytest.mark.parametrize(
    ("recipe", "options", "path"),
    [
        ("gpt-chars", {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "block_size": 4}, ["n_embd", "vocab_size"]),
        ("rnn-words", {"vocab_size": 40, "n_embd": 40, "n_hidden": 24, "bptt": 4}, ["n_embd", "vocab_size"]),
        ("regression", {"n_hidden": 1}, ["n_hidden", "values"]),
    ],
)
def test_an_axis_is_named_for_its_place_where_sizes_are_equal(recipe, options, path, text, monkeypatch, tmp_path):
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path))
    data = {} if recipe == "regression" else {"data": [str(text)]}
    config = load_config(recipe, {"graph": "off", "batch_size": 2, **data, **options})
    forward = explained(config, build_job(config), 0).forward
    assert [forward.path[0][2].axes[-1], forward.path[-1][2].axes[-1]] == path
    assert forward.output.axes[-1] == path[-1]


def test_stages_7_and_9_show_one_norm_or_say_why_there_are_two(case):
    facts, _ = case
    stage_7, stage_9 = facts.gradients.norm, facts.reset.now
    written = " ".join(" ".join(one for one, _ in lines(facts)).split())
    if facts.gradients.factor < 1:
        assert stage_9 < stage_7
        assert f"Before clipping its norm was {shown(stage_7)}, as in stage 7" in written
    else:
        assert stage_9 == stage_7
        assert "Before clipping" not in written


# --- the text ---

FORMS = ("{:.4f}", "{:.6g}", "{:.9g}", "{:g}", "{:.2%}", "{:.3g}", "{:.6f}", "{:+.6f}", "{:.2f}", "{:.1e}", "{:.1f}")
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-−+]\d+)?%?")


def leaves(value):
    """Every number in the facts."""
    if is_dataclass(value):
        for one in fields(value):
            yield from leaves(getattr(value, one.name))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def strings(value):
    if is_dataclass(value):
        for one in fields(value):
            yield from strings(getattr(value, one.name))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)
    elif isinstance(value, str):
        yield value


def derived(facts):
    """The few sums that the text makes of the facts."""
    loop, loss, parameters, reset = facts.loop, facts.loss, facts.parameters, facts.reset
    yield from (loop.before + 1, loop.position + 1, loop.rate / loop.base_rate)
    yield from (loop.planned * parameters.units_per_step,)
    yield loop.planned * parameters.units_per_step / parameters.train_units
    yield from (loss.mean - loss.baseline, math.exp(loss.mean), facts.update.loss_after - loss.step)
    yield from (guess.log_sum - guess.target.logit for guess in facts.forward.guesses)
    yield from (one.update_norm / one.weight_norm for one in parameters.layers if one.weight_norm)
    yield round(math.degrees(math.acos(min(1.0, reset.cosine))))
    yield from (one.updates + 1 for one in facts.update.arithmetic)


def test_every_number_of_the_text_is_a_fact(case):
    """No number stands in the text that is not in the facts, which the tests above have computed anew."""
    facts, _ = case
    known = set()
    for value in (*leaves(facts), *derived(facts)):
        for number in (value, -value):
            known |= {form.format(number) for form in FORMS} | {form.format(abs(number)) for form in FORMS}
            if isinstance(number, int) or float(number).is_integer():
                known |= {f"{int(number):,}", str(int(number))}
    # What the words themselves hold: the stages, lines of formulas, indices of rows, positions, Muon's constants.
    known |= {str(i) for i in range(13)} | {"-h", "2", "0.2", "16"}
    for string in strings(facts):  # a setting's value, a formula, an arithmetic line: numbers inside of facts
        known |= set(NUMBER.findall(string)) | set(NUMBER.findall(string.replace("−", "-")))
    names = sorted({layer.name for layer in facts.parameters.layers} | {p[0] for p in facts.forward.path}, key=len)
    for line, _ in lines(facts, 100):
        for name in reversed(names):
            line = line.replace(name, "")
        line = re.sub(r"float(32|64)|int64|(\d)(st|nd|rd|th)\b", r"\2", line)
        for number in NUMBER.findall(line):
            plain = number.replace("−", "-")
            assert plain in known or plain.lstrip("+-") in known, f"{number} in {line!r} is no fact"


def test_the_text_shows_what_a_learner_looks_for(case):
    facts, _ = case
    text = "\n".join(line for line, _ in lines(facts, 100))
    places = [text.index(f"\n{number}  {name} ─") for number, name in enumerate(STAGES, 1)]
    assert places == sorted(places)
    one = facts.loss
    for value in (one.mean, one.step, one.baseline):
        assert f"{value:.4f}" in text
    for value in (one.smallest, one.largest):
        assert (f"{value:.4f}" if one.classes else f"{value:.6g}") in text
    for slope in facts.gradients.slopes:
        assert f"{slope.gradient:.6g}" in text and f"{slope.difference:.6g}" in text
        assert f"they agree, to {slope.relative:.1e}" in text
    for arithmetic in facts.update.arithmetic:
        assert f"found after step(): {arithmetic.found:.9g}: equal" in text
        assert all(term.formula in text and f"{term.value:.9g}" in text for term in arithmetic.terms)
    for kept in facts.reset.kept:
        assert f"{kept.without:.6g}" in text
    for row in facts.batch.text[:1]:
        assert all(f"{value:.2f}" in text for value in row.losses)


@pytest.mark.parametrize("width", [60, 80, 100, 300])
def test_lines_fit_the_terminal(case, width):
    facts, _ = case
    room = min(max(width, 80), 100)
    for line, _ in lines(facts, width):
        assert len(line) <= room, line


def test_a_terminal_without_unicode_gets_ascii(case):
    facts, _ = case
    for line, _ in lines(facts, 80, unicode=False):
        assert line.isascii(), line
    assert in_ascii("√v × 2 − 1") == "sqrt v x 2 - 1"


def evaluated(worked):
    """The value of a line of arithmetic, by its own rules: + − × / ², √ of a number, brackets."""
    plain = worked.replace("−", "-").replace("×", "*").replace("²", "**2")
    plain = re.sub(r"√([\d.e-]+)", r"(\1)**0.5", plain)
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node):
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            return left**right if isinstance(node.op, ast.Pow) else signs[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        return node.value

    return value(ast.parse(plain, mode="eval").body)


# --- that it can find a fault, and disturbs nothing ---


def test_the_observed_weights_are_the_plain_loop_s(text):
    """Looking changes no bit: after a step that was observed, the weights are those of the loop without a look."""
    config, step = configured("rnn", text)
    seen, plain = observed(config, build_job(config), step), Plain(config, step)
    for name, weight in seen.after.model.named_parameters():
        assert torch.equal(weight, plain.after[name]), name
    assert float(seen.result.loss) == plain.loss
    job = build_job(config)
    before = torch.get_rng_state()
    measured(config, job, seen)
    assert torch.equal(before, torch.get_rng_state())
    assert all(not p._post_accumulate_grad_hooks for p in seen.five.model.parameters())


class Wrong(torch.autograd.Function):
    """The identity, with a gradient a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


class Flawed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.layers = model.layers

    def forward(self, features):
        return Wrong.apply(self.layers(features))


def test_a_wrong_backward_is_seen(text):
    config, _ = configured("regression", text)
    job = build_job(config)
    flawed = Flawed(job.model)
    object.__setattr__(job, "model", flawed)
    facts = explained(config, job)
    assert not any(slope.agrees for slope in facts.gradients.slopes)
    assert facts.gradients.slopes[0].relative == pytest.approx(0.1 / 1.1, rel=1e-3)
    assert "THEY DIFFER" in "\n".join(line for line, _ in lines(facts))


def test_a_wrong_update_is_seen(text, monkeypatch):
    config, _ = configured("momentum", text)
    seen = observed(config, build_job(config), 1)
    assert measured(config, build_job(config), seen).update.arithmetic[0].equal
    for weight in seen.after.model.parameters():
        weight.data += 1e-5
    facts = measured(config, build_job(config), seen)
    assert not facts.update.arithmetic[0].equal
    assert "THEY DIFFER" in "\n".join(line for line, _ in lines(facts))


def test_a_frozen_tensor_and_a_rate_of_zero_are_said(text):
    config, _ = configured("regression", text, freeze=["layers.0.*"])
    facts = explained(config, build_job(config))
    assert {one.name: one.optimizer for one in facts.parameters.layers}["layers.0.weight"] == "frozen"
    assert facts.parameters.trained == 9 and {one.name for one in facts.gradients.slopes} <= {
        "layers.3.weight",
        "layers.3.bias",
    }
    assert "9 of them trained" in "\n".join(line for line, _ in lines(facts))


def test_half_precision_is_said_and_judged_by_its_digits(text):
    config, _ = configured("bigram", text, precision="bf16")
    facts = explained(config, build_job(config))
    assert any("bf16" in note for note in facts.notes) and facts.gradients.tolerance == 0.1
    assert all(slope.agrees for slope in facts.gradients.slopes)
