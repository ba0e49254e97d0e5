"""What keeps the start of a command short: torch's compiler is not imported for what needs none of it.

torch imports it (a thousand modules, half a second or more) when an optimizer is made, only to mark four methods as
not to be compiled, and wherever a tensor without storage is filled. Owns the ways around both, for a run's process; a
caller of `fs.train` or `fs.fit` keeps torch as it is. Not around `Optimizer.step`, whose wrapper imports it as well.
"""

import sys

import torch

from fivestep.models.gpt import NGRAM_ROWS
from fivestep.run.config import Config

MARK = "__dynamo_disable"  # where `torch._compile` keeps the function that stands in for a marked one


def postpone_compiler() -> None:
    """Let an optimizer's marked methods run as they are, where nothing has imported torch's compiler so far.

    That is what the mark does outside of a compiled function. On a torch without such marks this does nothing.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        function = getattr(getattr(torch.optim.Optimizer, method), "__wrapped__", None)
        if function is not None and not hasattr(function, MARK):
            setattr(function, MARK, function)


def weights_at_most(config: Config, inputs: int, outputs: int) -> int:
    """Bytes that no model of these sizes exceeds, in float32: a bound, without making one.

    Tables of ids or positions, the way out of them, and at most 16 matrices a layer, each as wide as all widths.
    """
    width = config.n_embd + config.n_hidden
    tables = (inputs + outputs + (config.max_len or 0) + config.block_size) * (2 * width + 2)
    pairs = inputs * inputs if config.model == "bigram" else 0
    if config.model == "gpt" and config.ngrams > 1:
        pairs = NGRAM_ROWS * config.n_embd
    return 4 * (tables + pairs + 16 * (config.n_layer + 1) * (width + 1) ** 2)
