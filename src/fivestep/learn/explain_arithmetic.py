"""What an optimizer does to one weight, written out: each line a formula, its numbers and its value.

    AdamW   decay, m, v, both corrected, the step       (Kingma & Ba 2015; Loshchilov & Hutter 2019)
    SGD     decay, momentum, the step
    Muon    momentum, Newton-Schulz, the step           (Jordan et al. 2024), in norms: it moves a matrix as one

Computed in Python's floats from what the optimizer read, and compared with what it left. Owns this arithmetic;
updates nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fivestep.learn.explain_facts import Arithmetic, Term


def worked_out(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    rate: float,
    name: str,
    index: tuple[int, ...],
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    after: Tensor,
    state_after: dict[str, Any],
    completed: int,
) -> Arithmetic | None:
    """The update of `weight[index]` by `gradient`, from the optimizer's `state`, beside `after[index]`.

    rate: the group's learning rate in this update. completed: updates of the training so far, for an optimizer that
    does not count a weight's own. None for an optimizer that is not known here, and for options of
    a known one that no recipe has.
    """
    kind = type(optimizer).__name__
    before, slope, found = float(weight[index]), float(gradient[index]), float(after[index])
    number = {key: float(value) for key, value in group.items() if type(value) in (int, float)}
    updates = int(state.get("step", completed))
    inputs = {"w": before, "g": slope}
    if any(group.get(option) for option in ("amsgrad", "maximize")):
        return None
    if kind in ("Adam", "AdamW"):
        first, second = (at(state, key, index) for key in ("exp_avg", "exp_avg_sq"))
        inputs |= {"m": first, "v": second}
        kept = at(state_after, "exp_avg", index), at(state_after, "exp_avg_sq", index)
        decoupled = bool(group.get("decoupled_weight_decay", kind == "AdamW"))
        terms = adam(inputs, rate, number, group["betas"], updates + 1, decoupled, kept)
    elif kind == "SGD" and not group.get("nesterov") and not group.get("dampening"):
        buffer = state.get("momentum_buffer")
        if number["momentum"]:
            inputs["buffer"] = 0.0 if buffer is None else float(buffer[index])
        kept_buffer = at(state_after, "momentum_buffer", index) if number["momentum"] else None
        terms = sgd(inputs, rate, number, buffer is None, kept_buffer)
    elif kind == "Muon":
        terms = muon(inputs, rate, group, index, gradient, state, state_after)
    else:
        return None
    as_found = equal(terms[-1].value, found, before)
    return Arithmetic(kind, name, index, rate, updates, inputs, terms, found, as_found)


def equal(computed: float, found: float, before: float) -> bool:
    """Whether two float32 results of one formula are the same but for the rounding of its steps.

    A few units of the last place of the weight, and as much of how far it moved.
    """
    return abs(computed - found) <= 3 * 2.0**-23 * abs(before) + 1e-5 * abs(found - before) + 1e-37


def at(state: dict[str, Any], key: str, index: tuple[int, ...]) -> float:
    """One number that an optimizer remembers; 0 before the first update."""
    return float(state[key][index]) if key in state else 0.0


def adam(
    inputs: dict[str, float],
    rate: float,
    group: dict[str, float],
    betas: tuple[float, float],
    t: int,
    decoupled: bool,
    kept: tuple[float, float],
) -> list[Term]:
    """Adam's lines for one weight; with `decoupled` decay, AdamW's. kept: both averages as the optimizer has them."""
    w, g, m, v = (inputs[key] for key in "wgmv")
    decay, eps, (b1, b2) = group["weight_decay"], group["eps"], betas
    terms = []
    if decay and decoupled:
        worked = f"{n(w)} × (1 − {n(rate)} × {n(decay)})"
        w = w * (1 - rate * decay)
        terms.append(Term("w decayed", "w × (1 − lr × decay)", worked, w))
    elif decay:
        worked = f"{n(g)} + {n(decay)} × {n(w)}"
        g = g + decay * w
        terms.append(Term("g", "g + decay × w", worked, g))
    worked = f"{n(b1)} × {n(m)} + {n(1 - b1)} × {n(g)}"
    m = b1 * m + (1 - b1) * g
    terms.append(Term("m", "β1 × m + (1 − β1) × g", worked, m, kept[0]))
    worked = f"{n(b2)} × {n(v)} + {n(1 - b2)} × {n(g)}²"
    v = b2 * v + (1 - b2) * g * g
    terms.append(Term("v", "β2 × v + (1 − β2) × g²", worked, v, kept[1]))
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    terms.append(Term("m_hat", f"m / (1 − β1^{t})", f"{n(m)} / {n(1 - b1**t)}", m_hat))
    terms.append(Term("v_hat", f"v / (1 − β2^{t})", f"{n(v)} / {n(1 - b2**t)}", v_hat))
    new = w - rate * m_hat / (math.sqrt(v_hat) + eps)
    worked = f"{n(w)} − {n(rate)} × {n(m_hat)} / (√{n(v_hat)} + {n(eps)})"
    terms.append(Term("new w", "w − lr × m_hat / (√v_hat + ε)", worked, new))
    return terms


def sgd(
    inputs: dict[str, float], rate: float, group: dict[str, float], first: bool, kept: float | None
) -> list[Term]:
    """SGD's lines for one weight. first: there is no momentum yet, so the gradient itself begins it."""
    w, g, terms = inputs["w"], inputs["g"], []
    if decay := group["weight_decay"]:
        worked = f"{n(g)} + {n(decay)} × {n(w)}"
        g = g + decay * w
        terms.append(Term("g", "g + decay × w", worked, g))
    step = "g"
    if momentum := group["momentum"]:
        buffer = inputs["buffer"]
        worked = n(g) if first else f"{n(momentum)} × {n(buffer)} + {n(g)}"
        g, step = g if first else momentum * buffer + g, "buffer"
        terms.append(Term("buffer", "g" if first else "momentum × buffer + g", worked, g, kept))
    terms.append(Term("new w", f"w − lr × {step}", f"{n(w)} − {n(rate)} × {n(g)}", w - rate * g))
    return terms


def muon(
    inputs: dict[str, float],
    rate: float,
    group: dict[str, Any],
    index: tuple[int, ...],
    gradient: Tensor,
    state: dict[str, Any],
    state_after: dict[str, Any],
) -> list[Term]:
    """Muon's lines: of matrices their norms, of the last line one weight."""
    momentum, decay, w = group["momentum"], group["weight_decay"], inputs["w"]
    g = gradient.float()
    buffer = state["momentum_buffer"].float() if "momentum_buffer" in state else torch.zeros_like(g)
    mixed = torch.lerp(buffer, g, 1 - momentum)
    kept = float(state_after["momentum_buffer"].norm())
    keep, take = n(momentum), n(1 - momentum)
    terms = [Term("|B|", f"norm of {keep} × B + {take} × G", "", float(mixed.norm()), kept)]
    update = torch.lerp(g, mixed, momentum) if group["nesterov"] else mixed
    if group["nesterov"]:
        terms.append(Term("|U|", f"norm of {take} × G + {keep} × B", "", float(update.norm())))
    spread = torch.linalg.svdvals(update)
    terms.append(Term("stretch", "largest over mean singular value of U", "", float(spread[0] / spread.mean())))
    whitened = newton_schulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
    terms.append(Term("|O|", f"norm after {group['ns_steps']} Newton-Schulz rounds", "", float(whitened.norm())))
    spread = torch.linalg.svdvals(whitened.float())
    terms.append(Term("stretch", "largest over mean singular value of O", "", float(spread[0] / spread.mean())))
    rows, columns = gradient.shape
    factor, formula, worked = adjusted(group["adjust_lr_fn"], rows, columns)
    terms.append(Term("rate", f"lr × {formula}", f"{n(rate)} × {worked}", rate * factor))
    o = float(whitened[index])
    new = w * (1 - rate * decay) - rate * factor * o
    worked = f"{n(w)} × (1 − {n(rate)} × {n(decay)}) − {n(rate * factor)} × {n(o)}"
    terms.append(Term("new w", "w × (1 − lr × decay) − rate × o", worked, new))
    return terms


def newton_schulz(update: Tensor, coefficients: tuple[float, float, float], rounds: int, eps: float) -> Tensor:
    """`update` with singular values near 1, in bfloat16 as Muon computes it: x <- a x + (b A + c A²) x, A = x xᵀ."""
    a, b, c = coefficients
    tall = update.shape[0] > update.shape[1]
    x = (update.T if tall else update).bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def adjusted(rule: str | None, rows: int, columns: int) -> tuple[float, str, str]:
    """What Muon multiplies its rate by for a matrix of these sizes, as a formula and in numbers."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns)), "0.2 × √max(rows, columns)", f"0.2 × √{max(rows, columns)}"
    if rule in (None, "original"):
        ratio = max(1, rows / columns)
        return math.sqrt(ratio), "√max(1, rows / columns)", f"√{n(ratio)}"
    return 1.0, "1", "1"


def n(value: float) -> str:
    """A number in a line of arithmetic: nine digits hold a float32."""
    text = f"{value:.9g}".replace("-", "−")
    return f"({text})" if text.startswith("−") else text
