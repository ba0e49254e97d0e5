"""100,000 fuzzed inputs to everything that reads a run: no hang, no exception but a FivestepError.

Mutations of real files, of their bytes and of their structure, with digests and seals that are right.
FIVESTEP_FUZZED says how many in all; the rate is printed.
"""

import json
import os
import random
import time
import tomllib
from contextlib import suppress

import pytest

import fivestep as fs
from fivestep.data import tokenizer as tokenizers
from fivestep.run.checkpoint import DamagedError, load_checkpoint, load_state, read_manifest
from fivestep.run.config import load_config
from fivestep.run.metrics import known_rows
from fivestep.run.report import summary
from tests.promises.hostile import MANIFEST, ODD, TENSORS, TREE, WEIGHTS, changed, checkpoint_of, places, raw, reseal
from tests.promises.test_24_hostile import JOBS, made, mutations, sound, try_state  # noqa: F401  (a fixture)

TRIALS = int(os.environ.get("FIVESTEP_FUZZED", "100000"))
WORDS = [*b'null -1 1e999 NaN [ ] { } : , " \\u0000 $tensor \xff \0 ../ true'.split(), b"9" * 30, b"\n", b" "]


def fuzzed_bytes(chance, content):
    """One to eight changes: bits, tokens put in or over, pieces doubled, taken out, moved, cut off."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice([1, 2, 8, 64, 512]))
        match chance.randrange(6):
            case 0 if content:
                content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                content[at:at] = chance.choice(WORDS)
            case 2:
                content[at:end] = chance.choice(WORDS)
            case 3:
                content[at:at] = content[at:end] * chance.choice([1, 2, 50])
            case 4:
                del content[at:end]
            case 5:
                del content[at:]
    return bytes(content)


def fuzzed_json(chance, content):
    """Some parts of a JSON document replaced, taken away or moved elsewhere."""
    value = json.loads(content)
    for _ in range(chance.choice([1, 1, 3])):
        paths = list(places(value, most=4))
        if not paths:
            break
        path = chance.choice(paths)
        new = chance.choice([..., *ODD])
        if chance.random() < 0.3:
            new = value
            for key in chance.choice(paths):
                new = new[key]
        value = changed(value, path, new)
    return json.dumps(value).encode()


def fuzzed_header(chance, content):
    n = int.from_bytes(content[:8], "little")
    return raw(fuzzed_json(chance, content[8 : 8 + n]), content[8 + n :])


def one(chance, run, originals):
    """Fuzz one file of the run, read all that reads it, put it back."""
    path = chance.choice(list(originals))
    content, structured = originals[path], chance.random() < 0.5
    if structured and path.suffix == ".json":
        new = fuzzed_json(chance, content)
    elif structured and path.suffix == ".safetensors":
        new = fuzzed_header(chance, content)
    else:
        new = fuzzed_bytes(chance, content)
    checkpoint = checkpoint_of(run)
    manifest = (checkpoint / MANIFEST).read_bytes()
    path.write_bytes(new)
    try:
        if path.name in (WEIGHTS, TENSORS, TREE):
            reseal(checkpoint)
        begun = time.process_time()
        read(path, run, checkpoint)
        assert time.process_time() - begun < 1.0, (
            f"{path.name} took {time.process_time() - begun:.1f} s: {new[:200]!r}"
        )
    except fs.FivestepError:
        return True
    except Exception as error:
        raise AssertionError(f"{path.name}: {type(error).__name__}: {error}: {new[:2000]!r}") from error
    finally:
        path.write_bytes(content)
        (checkpoint / MANIFEST).write_bytes(manifest)
    return False


def read(path, run, checkpoint):
    match path.name:
        case "config.toml":
            load_config(str(path), {})
        case "tokenizer.json":
            tokenizers.load(path)
        case "environment.json":
            fs.load(run, device="cpu")
        case "metrics.jsonl" | "skipped.jsonl":
            known_rows(path)
        case _:
            found = read_manifest(checkpoint)
            with suppress(DamagedError):
                load_state(found)
            load_checkpoint(found, MODEL[0])
    if path.parent == run:
        summary(run).as_json()


MODEL = []


@pytest.mark.torture
def test_every_reader(sound, tmp_path, capsys):  # noqa: F811
    MODEL[:] = [fs.load(sound, device="cpu").model]
    originals = {path: path.read_bytes() for path in sorted(sound.rglob("*")) if path.is_file()}
    originals.pop(sound / ".running", None)
    originals[sound / "skipped.jsonl"] = b'{"epoch": 0, "position": 4, "batches": 1, "step": 3, "loss": NaN}\n' * 3
    assert tomllib.loads(originals[sound / "config.toml"].decode())
    begun, refused = time.monotonic(), 0
    for number in range(TRIALS):
        refused += one(random.Random(number), sound, originals)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n{TRIALS:,} fuzzed inputs, {refused:,} refused, {TRIALS / seconds:,.0f} a second")
    assert refused > TRIALS // 4


@pytest.mark.torture
@pytest.mark.parametrize("job", JOBS)
def test_every_part_of_a_state(tmp_path, job):
    """Each part of a saved state, each odd value in its place; a hidden state's form only its model knows."""
    run = made(tmp_path / "run", job)
    for case in mutations(run):
        if case[1][:2] != ("state", "carry"):
            try_state(run, tmp_path / "work", job, *case)
