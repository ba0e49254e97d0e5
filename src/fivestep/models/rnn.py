"""The recurrent word model: embedding, recurrent layers, linear decoder, time first.

Owns the layers and the shape of the hidden state. Carrying the state from segment to segment and detaching
it is the objective's work (`loop/language.py`).
"""

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError, suggestion
from fivestep.models.contract import require_dropout, require_positive

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")

# [n_layer, batch, n_hidden]; an LSTM has two, the output and the cell.
Hidden = Tensor | tuple[Tensor, Tensor]


class RNN(nn.Module):
    """A language model of `n_layer` recurrent layers, after word_language_model's in pytorch/examples.

    `cell` is one of `CELLS`. Dropout falls on the embeddings, between layers, and before the decoder. With
    `tied` the decoder's matrix is the encoder's (Press and Wolf 2017); where `n_hidden` differs from
    `n_embd` a bias-free projection then stands between. Raises `UsageError` for a bad size, cell or dropout.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 200,
        n_hidden: int = 200,
        n_layer: int = 2,
        cell: str = "lstm",
        dropout: float = 0.2,
        tied: bool = False,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, n_embd=n_embd, n_hidden=n_hidden, n_layer=n_layer)
        require_dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, n_embd)
        self.rnn = _build_cell(cell, n_embd, n_hidden, n_layer, dropout)
        needs_projection = tied and n_hidden != n_embd
        self.projection = nn.Linear(n_hidden, n_embd, bias=False) if needs_projection else nn.Identity()
        self.decoder = nn.Linear(n_embd if tied else n_hidden, vocab_size)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if not tied:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, data: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """Ids `[seq_len, batch]` to logits `[seq_len, batch, vocab_size]` and the hidden state after them.

        `hidden` is the state before them; None means zeros.
        """
        features, hidden_after = self.features(data, hidden)
        output: Tensor = self.decoder(features)
        return output, hidden_after

    def features(self, data: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """What `forward` gives to the decoder, `[seq_len, batch, width]`, and the hidden state."""
        embedded = self.dropout(self.encoder(data))  # [seq_len, batch, n_embd]
        output, hidden_after = self.rnn(embedded, hidden)  # [seq_len, batch, n_hidden]
        return self.projection(self.dropout(output)), hidden_after

    def init_hidden(self, batch_size: int) -> Hidden:
        """Zeros `[n_layer, batch_size, n_hidden]` beside the weights (device, dtype); two for an LSTM."""
        shape = (self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        weight = self.encoder.weight
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return (zeros, torch.zeros_like(zeros)) if isinstance(self.rnn, nn.LSTM) else zeros

    def predict_next(self, ids: Tensor, memory: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """Logits `[batch, vocab_size]` after `ids` `[batch, time]`; the memory is the hidden state."""
        output, hidden = self.forward(ids.t(), memory)
        return output[-1], hidden


def _build_cell(cell: str, n_embd: int, n_hidden: int, n_layer: int, dropout: float) -> nn.RNNBase:
    # torch warns about dropout between layers where there is only one.
    between = dropout if n_layer > 1 else 0.0
    match cell:
        case "lstm":
            return nn.LSTM(n_embd, n_hidden, n_layer, dropout=between)
        case "gru":
            return nn.GRU(n_embd, n_hidden, n_layer, dropout=between)
        case "rnn_tanh" | "rnn_relu":
            nonlinearity = cell.removeprefix("rnn_")
            return nn.RNN(n_embd, n_hidden, n_layer, dropout=between, nonlinearity=nonlinearity)
    allowed = ", ".join(CELLS)
    raise UsageError(f"cell is {cell!r}; it must be one of {allowed}: change --cell{suggestion(cell, CELLS)}.")
