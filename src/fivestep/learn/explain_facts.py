"""What `explain` knows of one iteration: plain numbers and text, no tensor, a field for each thing that is shown.

    Explanation
      parameters   optimizers   loop   batch   forward   loss   gradients   update   reset

Owns the names of the facts. How they come about is `explain_observe.py`'s, how they look `explain_text.py`'s and
`explain_page.py`'s. An index that is shown is torch's own, from 0.
"""

from dataclasses import dataclass, field
from typing import Any

WINDOWS, SEGMENTS, ROWS = "windows", "segments", "rows"  # the three workloads


@dataclass(frozen=True)
class Shape:
    """A tensor's name, its axes by name, their sizes, and the kind of its numbers."""

    name: str
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Setting:
    """An option of the configuration, its value, and what it decides."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Layer:
    """One parameter tensor of the model. Norms are 2-norms; the gradient's is before clipping."""

    name: str
    sizes: tuple[int, ...]
    count: int
    optimizer: str  # "frozen" where none steps it
    weight_norm: float  # before the update
    gradient_norm: float | None  # None where no gradient reached it
    update_norm: float


@dataclass(frozen=True)
class Parameters:
    """Stage 1."""

    settings: list[Setting]
    model: str
    count: int
    trained: int
    layers: list[Layer]
    units_per_step: int  # tokens, or rows
    units: str
    train_units: int | None  # in the training split, where that is known


@dataclass(frozen=True)
class Group:
    """One parameter group: its optimizer's class, how much it holds, and its own options."""

    optimizer: str
    tensors: int
    count: int
    options: dict[str, float]
    kept: list[str]  # what the optimizer remembers of each weight, by torch's names


@dataclass(frozen=True)
class Loop:
    """Stage 3. `before` counts completed updates; `epoch` is counted from 1, `position` in micro-batches from 0."""

    before: int
    planned: int | None
    epoch: int
    position: int
    per_epoch: int | None
    micro_batches: int
    base_rate: float
    rate: float
    schedule: str


@dataclass(frozen=True)
class TextRow:
    """What one window or column reads and should say next, token by token, with the loss of each."""

    sees: list[str]
    predicts: list[str]
    losses: list[float]


@dataclass(frozen=True)
class ExampleRow:
    """One row: features, label (a class's number, or values), outputs (logits, or values) and its loss."""

    features: list[float]
    label: list[float]
    outputs: list[float]
    loss: float


@dataclass(frozen=True)
class Carry:
    """The hidden state that a segment begins with and leaves behind."""

    shapes: list[Shape]
    norms_before: list[float]
    norms_after: list[float]
    fresh: bool  # zeros: an epoch's first segment
    ended_with: str | None  # the last target of the first column, one segment earlier


@dataclass(frozen=True)
class Batch:
    """Stage 4: the first micro-batch of the step."""

    shapes: list[Shape]
    count: float  # what the mean loss is over, in the whole step
    offset: int | None  # where in the training tokens its first window or column begins
    text: list[TextRow]
    joint: str  # what stands between two tokens in the text
    examples: list[ExampleRow]
    side: int | None  # of pictures, where features are one
    carry: Carry | None


@dataclass(frozen=True)
class Likely:
    """A token (or class), its logit and its share of the softmax."""

    token: str
    logit: float
    probability: float


@dataclass(frozen=True)
class Guess:
    """What the model says at one position: the likeliest, the wanted one, its rank (1: the likeliest)."""

    place: str
    sees: str
    likeliest: list[Likely]
    target: Likely
    rank: int
    log_sum: float  # ln of the sum of exp(logit)


@dataclass(frozen=True)
class Heat:
    """Logits as a map: a row a position, a column a token."""

    places: list[str]
    sees: list[str]  # the token read at each place; empty where that is no token
    tokens: list[str]
    logits: list[list[float]]
    targets: list[int | None]  # the column that each row should have chosen


@dataclass(frozen=True)
class Forward:
    """Stage 5. `path` is what each part of the model gave out, in order."""

    path: list[tuple[str, str, Shape]]
    output: Shape
    guesses: list[Guess]
    heat: Heat | None


@dataclass(frozen=True)
class Loss:
    """Stage 6. `step` is what the step itself returned, `mean` the mean of all positions' losses."""

    step: float
    mean: float
    count: int
    smallest: float
    largest: float
    baseline: float  # ln V, or what always answering the mean would cost
    baseline_name: str
    classes: int | None
    smoothing: float


@dataclass(frozen=True)
class Slope:
    """The gradient of one weight beside (loss(w + h) - loss(w - h)) / 2h, in float64 on a copy of the model."""

    name: str
    index: tuple[int, ...]
    meaning: str  # whose row it is in, where that is a token's
    weight: float
    gradient: float  # of the step itself, before clipping
    h: float
    loss_above: float
    loss_below: float
    difference: float
    relative: float
    agrees: bool


@dataclass(frozen=True)
class Gradients:
    """Stage 7."""

    slopes: list[Slope]
    norm: float
    clip_norm: float | None
    clip_value: float | None
    factor: float  # what all gradients were multiplied by: 1 where nothing was clipped
    unused: list[str]
    tolerance: float


@dataclass(frozen=True)
class Term:
    """A line of arithmetic: a name, its formula, the same in numbers, the value; torch's own, where it keeps it."""

    name: str
    formula: str
    worked: str
    value: float
    found: float | None = None


@dataclass(frozen=True)
class Arithmetic:
    """One weight through its optimizer: line by line, and beside it the weight found after the update."""

    optimizer: str
    name: str
    index: tuple[int, ...]
    rate: float
    updates: int  # completed before this one
    inputs: dict[str, float]
    terms: list[Term]
    found: float
    equal: bool


@dataclass(frozen=True)
class Update:
    """Stage 8. `loss_after` is of the same batch, dropout and hidden state, with the new weights."""

    arithmetic: list[Arithmetic]
    loss_after: float


@dataclass(frozen=True)
class Kept:
    """One weight's gradient now, from the next batch, and what stood there without a reset in between."""

    name: str
    index: tuple[int, ...]
    now: float
    following: float
    without: float


@dataclass(frozen=True)
class Reset:
    """Stage 9. Norms of: what the step left in `.grad`, the next batch's gradient, and both added up."""

    kept: list[Kept]
    now: float
    following: float
    without: float
    cosine: float  # between the gradient of the next batch and the sum


@dataclass(frozen=True)
class Explanation:
    """One iteration of a job."""

    title: str
    workload: str
    about: list[tuple[str, str]]
    parameters: Parameters
    groups: list[Group]
    loop: Loop
    batch: Batch
    forward: Forward
    loss: Loss
    gradients: Gradients
    update: Update
    reset: Reset
    notes: list[str] = field(default_factory=list)


def place_of(name: str, index: tuple[int, ...]) -> str:
    """`weight[3, 4]`."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def plain(value: Any) -> str:
    """Six digits of a number."""
    return f"{value:.6g}"
