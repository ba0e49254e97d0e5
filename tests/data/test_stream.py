import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from fivestep.data.examples import Examples
from fivestep.data.stream import batches, batches_per_epoch
from fivestep.errors import UsageError


class Told:
    """A sampler that notes the epochs it is told."""

    def __init__(self, length=6):
        self.length, self.epochs = length, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(range(self.length))

    def __len__(self):
        return self.length


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def test_a_stream_seeks():
    stream = Examples(torch.arange(10.0)[:, None], torch.arange(10), batch_size=3)
    whole = [labels.tolist() for _, labels in batches(stream, 4)]
    assert [labels.tolist() for _, labels in batches(stream, 4, start=2)] == whole[2:]
    assert whole != [labels.tolist() for _, labels in batches(stream, 5)]
    assert [y.tolist() for _, y in stream] == [y.tolist() for _, y in batches(stream, 0)]


@pytest.mark.parametrize("start", [0, 1, 3, 9])
def test_other_iterables_are_skipped_forward(start):
    items = [10, 20, 30, 40]
    assert list(batches(items, 0, start)) == items[start:]
    assert list(batches((i for i in items), 0, start)) == items[start:]
    loader = DataLoader(TensorDataset(torch.tensor(items)), batch_size=1)
    assert [int(batch[0]) for batch in batches(loader, 0, start)] == items[start:]


def test_no_batch_is_drawn_before_it_is_asked_for():
    drawn = []

    def source():
        for i in range(6):
            drawn.append(i)
            yield i

    iterator = batches(source(), 0, start=2)
    assert drawn == []
    assert next(iterator) == 2 and drawn == [0, 1, 2]
    assert next(iterator) == 3 and drawn == [0, 1, 2, 3]


def test_samplers_are_told_the_epoch_once():
    told = Told()
    loader = DataLoader(TensorDataset(torch.arange(6)), sampler=told, batch_size=2)  # its batch_sampler holds it too
    list(batches(loader, 3))
    assert told.epochs == [3]
    inner = Told()
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_sampler=BatchSampler(inner, 2, drop_last=False))
    list(batches(loader, 5))
    assert inner.epochs == [5]
    itself = Told()
    list(batches(itself, 7))
    assert itself.epochs == [7]


def test_an_attribute_called_epoch_is_no_stream():
    told = Told()
    told.epoch = 3
    assert list(batches(told, 1, start=4)) == [4, 5]


def test_lengths():
    data = TensorDataset(torch.arange(6))
    assert batches_per_epoch(DataLoader(data, batch_size=4, sampler=SequentialSampler(data))) == 2
    assert batches_per_epoch(Examples(torch.zeros(5, 1), torch.zeros(5), batch_size=2)) == 3
    assert batches_per_epoch(i for i in range(3)) is None
    assert batches_per_epoch(DataLoader(Unsized())) is None


def test_what_cannot_be_iterated_is_refused_at_once():
    for thing in (3, None, object()):
        with pytest.raises(UsageError, match=type(thing).__name__):
            batches(thing, 0)


def test_an_error_of_the_users_own_iterable_is_theirs():
    class Broken:
        def __iter__(self):
            raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        batches(Broken(), 0)
