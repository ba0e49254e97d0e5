"""Cross-entropy over a large vocabulary, without ever holding all logits.

    features [n, width] -> a chunk of rows -> logits [rows, vocab_size] -> softmax, in place -> loss
                                                  |
                          minus one at the target, in place: the gradient of the logits, used up at once
                                 -> gradient of the features,   -> added to the gradient of the decoder

A plain loop writes the logits, their log-softmax and two gradients of that size to fresh memory and multiplies them
by MKL. Here a chunk stays in reused memory, the gradients are products made while it is there, and on the CPU the
products are oneDNN's, in full float32 too: by the measure of `benchmarks/word_lstm.py`, a step in less than half the
time. Every figure is exact to rounding; the order of sums differs, so bits differ from torch's cross-entropy.

A model takes part by two names: `features(inputs...)`, what its forward gives before the decoder, and `decoder`, an
nn.Linear, so that `forward` is `decoder(features(...))`. Owns the loss, its gradients and the rule of when it is
used. Does not know what a batch is; that is the objective's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fivestep.errors import UsageError, named
from fivestep.loop.watched import is_watched

CHUNK = 16 << 20  # bytes of float32 logits at a time: they stay in the cache, and in memory that the allocator keeps
LEAST_WORDS = 2048  # in a vocabulary, for "auto"
LARGE = 32 << 20  # bytes of float32 logits that glibc's allocator takes from the system anew each time
ACCUMULATING = "mkldnn::_linear_pointwise.binary(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y"


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(features, weight, bias), targets)`, the mean over what is not ignored, in chunks.

    features [n, width], weight [vocab_size, width], targets [n] int64, bias [vocab_size]. Gradients are computed
    here, where grad is on, and handed out by `backward`, once. Under torch's autocast, or with weights, in bfloat16
    the products are bfloat16, all sums and the softmax float32. Raises UsageError for shapes that do not fit.
    """
    width = weight.shape[1]
    if features.ndim != 2 or targets.shape != features.shape[:1] or features.shape[1] != width:
        raise UsageError(
            f"features {list(features.shape)} must be [n, {width}], as the decoder takes them, and targets "
            f"{list(targets.shape)} [n]"
        )
    if targets.dtype is not torch.int64:
        raise UsageError(f"targets must be int64, the ids of words; got {targets.dtype}")
    device = features.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    graded = torch.is_grad_enabled()
    options = (ignore_index, label_smoothing, half, graded)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(features, weight, bias, targets, *options)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignored: int,
        smoothing: float,
        half: bool,
        graded: bool,
    ) -> Tensor:
        kind = torch.bfloat16 if half else weight.dtype
        x, w = features.to(kind), weight.to(kind)
        buffers = Buffers(x, w)
        kept = (targets != ignored)[:, None]  # [n, 1]
        wanted = targets[:, None].where(kept, 0)  # any word will do for what is ignored: its share is 0
        of_features, of_weight, of_bias = (graded and needed for needed in ctx.needs_input_grad[:3])
        grad_features = x.new_empty(x.shape, dtype=buffers.dtype) if of_features else None
        extended = torch.cat([x, x.new_ones(len(x), 1)], 1) * kept if of_weight or of_bias else None
        sums = None  # [width + 1, vocab_size]: the weight's gradient transposed, and the bias's as the last row
        losses = x.new_empty(x.shape[:1], dtype=buffers.dtype)

        for begin in range(0, len(x), buffers.rows):
            part = slice(begin, begin + buffers.rows)
            logits = buffers.logits(x[part], w, bias)
            losses[part], p = losses_and_shares(logits, wanted[part], smoothing)
            if grad_features is None and extended is None:
                continue
            delta = buffers.rounded(less_target(p, wanted[part], smoothing))  # the gradient of the logits
            if grad_features is not None:
                grad_features[part] = product(delta, w.t())
            if extended is not None:
                sums = added(sums, extended[part].t().contiguous(), delta.t(), buffers.dtype)

        count = kept.sum()
        if grad_features is not None:
            grad_features *= kept
        ctx.gradients = grad_features, sums, 1 / count.clamp(min=1).to(losses.dtype)
        ctx.inputs = features, weight, bias
        return losses.where(kept[:, 0], 0).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.gradients is None:
            raise UsageError(
                "the fused loss gives its gradients away at the first backward: for a second one, with "
                "retain_graph=True, take the plain loss (fused=False, --loss plain)"
            )
        (grad_features, sums, share), ctx.gradients = ctx.gradients, None
        features, weight, bias = ctx.inputs
        share = share * grad
        grad_weight = grad_bias = None
        if grad_features is not None:
            grad_features = grad_features.mul_(share).to(features.dtype)
        if sums is not None:
            sums.mul_(share)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.empty_like(weight).copy_(sums[:-1].t())
            if ctx.needs_input_grad[2]:
                grad_bias = sums[-1].to(bias.dtype, copy=True)
        return grad_features, grad_weight, grad_bias, None, None, None, None, None


def losses_and_shares(logits: Tensor, wanted: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The loss of each row, [rows], and the softmax of `logits` [rows, vocab_size], which it takes the place of."""
    peak, at_target = logits.amax(1), at(wanted, logits)
    if smoothing:
        at_target = torch.lerp(at_target, logits.mean(1), smoothing)
    p = torch.softmax(logits, 1, out=logits)
    return peak - p.amax(1).log() - at_target, p  # the largest share is exp(peak) over the sum, so never near 0


def less_target(p: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """`p` less the distribution that is aimed at: the gradient of a row's loss with respect to its logits."""
    p.scatter_(1, wanted, p.gather(1, wanted) - (1 - smoothing))
    return p.sub_(smoothing / p.shape[1]) if smoothing else p


def at(words: Tensor, logits: Tensor) -> Tensor:
    """The logits [rows] of words [rows, 1]. Raises UsageError for one that the vocabulary has not."""
    try:
        return logits.gather(1, words)[:, 0]
    except RuntimeError as error:
        raise UsageError(f"a target is out of range for {logits.shape[1]:,} words: {error}") from error


class Buffers:
    """The memory of one chunk of logits, used again for the next one, and how many rows that is."""

    def __init__(self, x: Tensor, w: Tensor):
        chunks = max(1, -(-len(x) * len(w) * 4 // CHUNK))
        self.rows = max(1, -(-len(x) // chunks))  # chunks of about equal length
        self.dtype = torch.promote_types(x.dtype, torch.float32)  # of sums, losses and the softmax
        self.half = None if x.dtype is self.dtype else x.new_empty(self.rows, len(w))
        self.wide = None if onednn(x) else x.new_empty(self.rows, len(w), dtype=self.dtype)

    def logits(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ w.T + bias` [rows, vocab_size], in float32 or wider."""
        if self.wide is None:
            return product(x, w, bias)  # oneDNN brings its own memory; the allocator gives the same again
        logits = self.wide[: len(x)]
        if self.half is None:
            torch.mm(x, w.t(), out=logits)
        else:
            logits.copy_(torch.mm(x, w.t(), out=self.half[: len(x)]))
        return logits if bias is None else logits.add_(bias)

    def rounded(self, p: Tensor) -> Tensor:
        """`p` as the products take it."""
        return p if self.half is None else self.half[: len(p)].copy_(p)


def onednn(x: Tensor) -> bool:
    """Whether products of `x` are oneDNN's own: float32 on the CPU, unless the user switched it off.

    torch gives float32 products to MKL, which keeps to AVX2 where the processor is not Intel's. Tensors of another
    class than torch's own (without storage, to forecast memory with) are torch's to multiply.
    """
    enabled = HAS_ONEDNN and bool(torch.backends.mkldnn.enabled)
    return enabled and x.dtype is torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


def has_onednn() -> bool:
    """Whether this torch has the products, with the arguments that we know."""
    try:
        built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return built and str(torch.ops.mkldnn._linear_pointwise.binary._schema) == ACCUMULATING
    except (AttributeError, RuntimeError):
        return False


HAS_ONEDNN = has_onednn()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias`; a [m, k], b [n, k]."""
    if onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(a, b, bias)


def added(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + a @ b.T` in `dtype`; `total` may be used up."""
    if total is None:
        return product(a, b).to(dtype)
    if onednn(a):
        return torch.ops.mkldnn._linear_pointwise.binary(a, total, b, None, "add")  # type: ignore[no-any-return]
    return total.addmm_(a, b.t()) if a.dtype is dtype else total.add_(a @ b.t())


# --- when it is used, and how an objective uses it ---


def checked_fused(fused: Any) -> bool | str:
    """`fused` itself. Raises UsageError unless it is True, False or "auto"."""
    if fused is not True and fused is not False and fused != "auto":
        raise UsageError(f"fused = {named(fused)} must be True, False or 'auto' (--loss fused, plain or auto)")
    return fused  # type: ignore[no-any-return]


def is_fused(fused: bool | str, model: Any, criterion: Any, rows: int) -> bool:
    """Whether the loss of `rows` targets is this module's: asked for, or with "auto" where it is known to win.

    It wins on the CPU from LEAST_WORDS words on: in float32 by oneDNN's products, elsewhere where the logits would be
    LARGE. Where hooks watch the model or its decoder, or torch.compile traces, it is the plain one, which calls them.
    Raises UsageError where True cannot be.
    """
    if not fused:
        return False
    lacking = what_is_lacking(model, criterion)
    if lacking and fused is True:
        raise UsageError(f"fused=True (--loss fused) needs {lacking}; take fused='auto' or False (--loss plain)")
    if lacking or torch.compiler.is_compiling():
        return False
    if is_watched(getattr(model, "replicated", model)) or is_watched(model.decoder):  # DDP stands beside the model
        return False
    return fused is True or is_quicker(model.decoder.weight, rows)


def is_quicker(weight: Tensor, rows: int) -> bool:
    """The rule of "auto", as `benchmarks/word_lstm.py` and docs/decisions.md have it."""
    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or len(weight) < LEAST_WORDS:
        return False
    if not torch.is_autocast_enabled("cpu"):
        return onednn(weight) or rows * len(weight) * 4 >= LARGE
    return torch.get_autocast_dtype("cpu") is torch.bfloat16 and rows * len(weight) * 4 >= LARGE


def what_is_lacking(model: Any, criterion: Any) -> str | None:
    """What keeps this loss from standing for `criterion` over `model`'s logits; None where nothing does."""
    if type(criterion) is not nn.CrossEntropyLoss or criterion.weight is not None or criterion.reduction != "mean":
        return "the criterion nn.CrossEntropyLoss, without class weights, over a mean"
    if not callable(getattr(model, "features", None)) or type(getattr(model, "decoder", None)) is not nn.Linear:
        return f"a model with a method features() and an nn.Linear as decoder, which {type(model).__name__} has not"
    return None


class Undecoded:
    """A model as an objective calls it, as far as its features."""

    def __init__(self, model: Any):
        self.model, self.forward = model, model.features

    def __call__(self, *inputs: Any) -> Any:
        return self.forward(*inputs)

    def __getattr__(self, name: str) -> Any:  # init_hidden, where the model has it
        return getattr(self.model, name)


def fused_loss(objective: Any, model: Any, batch: Any, carry: Any) -> tuple[Tensor, Any] | None:
    """What `objective.loss` gives, by way of the features; None where the plain loss is to be taken."""
    if not is_fused(objective.fused, model, objective.criterion, objective.pair(batch)[1].numel()):
        return None
    features, targets, carry = objective.forward(Undecoded(model), batch, carry)
    criterion, decoder = objective.criterion, model.decoder
    options = {"ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
    return linear_cross_entropy(features, decoder.weight, targets, decoder.bias, **options), carry
