"""Data: from text or tensors to batches. Nothing here knows the model, the device or the process count.

    sources.py ──> corpus.py ──> tokenizer.py ──> tokens.py ──┬─> windows.py   (xb, yb), without a state
    read, decode   text, splits  text <-> ids     ids, mapped │    └─> mixture.py  of several texts, by weight
                                                  shards.py ──┴─> segments.py  (data, target), state carried
                                                  many as one
                                                      tensors ──> examples.py  (features, labels)

    preparation.py goes from a corpus to a token file, in blocks and in bounded memory; worker.py spreads the blocks
    over processes; words.py tells words apart, bpe.py asks Hugging Face's library for byte pairs.
    shards.py makes one of many token files, remote.py brings those that are elsewhere; weights.py reads weights.
    order.py says which position comes when, pure in (seed, epoch, position); stream.py what the loop asks of
    any of them; files.py writes files whole or not at all.

The text side (from sources to shards, and order) does not import torch.
"""
