"""Token files elsewhere: brought once, checked, bounded; errors of the network told and tried again."""

import json
import os
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fivestep.data import remote as module
from fivestep.data.remote import Remote, is_url, make_room
from fivestep.data.shards import LIST, NAME, open_token_source, verify_token_source
from fivestep.data.tokens import write_tokens
from fivestep.errors import UsageError
from tests.data.test_shards import ids_of, write

fsspec = pytest.importorskip("fsspec", reason="URLs need the extra remote")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FIVESTEP_REMOTE_GB", raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.0)
    return tmp_path / "cache" / "remote"


@pytest.fixture
def memory(tmp_path):
    """A folder of shards in fsspec's memory, and one token file."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    write(tmp_path / "wiki", ids_of())
    write_tokens(tmp_path / "one.safetensors", ids_of(), {"source": "abc"})
    files.put(str(tmp_path / "wiki"), "/bucket/wiki", recursive=True)
    files.put(str(tmp_path / "one.safetensors"), "/bucket/one.safetensors")
    return files


@pytest.fixture
def asked(memory, monkeypatch):
    """The (path, start, end) of every read, and a list of errors to raise before them."""
    reads, failing, plain = [], [], memory.cat_file

    def cat_file(path, start=None, end=None, **kwargs):
        reads.append((path.rpartition("/")[2], start, end))
        if failing:
            error = failing.pop(0)
            if isinstance(error, Exception):
                raise error
            return plain(path, start=start, end=end, **kwargs)[:error]
        return plain(path, start=start, end=end, **kwargs)

    monkeypatch.setattr(memory, "cat_file", cat_file)
    return reads, failing


def kept(cache):
    return sorted(cache.glob("*.safetensors"))


@pytest.mark.parametrize("url", ["memory://bucket/wiki", "memory://bucket/wiki/", f"memory://bucket/wiki/{LIST}"])
def test_shards_elsewhere_are_those_on_the_disk(memory, cache, url):
    tokens = open_token_source(url)
    assert not cache.exists()  # the list alone was read
    assert tokens.splits["train"][150] == ids_of()["train"][150] and len(kept(cache)) == 1
    begins = np.array([1, 777, 90, 500])
    expected = ids_of()["train"][begins[:, None] + np.arange(30)]
    assert np.array_equal(tokens.splits["train"].runs(begins, 30), expected)
    for split, ids in ids_of().items():
        assert np.array_equal(tokens.splits[split][:], ids)
    assert len(kept(cache)) == 12 and not list(cache.glob("*.part"))


def test_one_token_file_elsewhere(memory, cache):
    tokens = open_token_source("memory://bucket/one.safetensors")
    assert np.array_equal(tokens.splits["val"], ids_of()["val"]) and len(kept(cache)) == 1
    with pytest.raises(UsageError, match="one shard of several"):
        open_token_source(f"memory://bucket/wiki/{NAME.format(2)}")


def test_what_the_cache_holds_is_not_asked_for_again(asked):
    reads, _ = asked
    open_token_source("memory://bucket/wiki").splits["train"][:]
    assert len(reads) == 12  # the list, and the eleven shards that hold some of it
    del reads[:]
    assert np.array_equal(open_token_source("memory://bucket/wiki").splits["train"][:], ids_of()["train"])
    assert [name for name, *_ in reads] == [LIST]


def test_a_large_file_comes_in_pieces_and_a_failed_piece_alone_again(asked, monkeypatch):
    reads, failing = asked
    monkeypatch.setattr(module, "PIECE", 500)
    tokens = open_token_source("memory://bucket/wiki")
    del reads[:]
    failing += [ConnectionResetError("gone"), 100]  # then a piece that is cut short
    with pytest.warns(UserWarning, match="try") as told:
        assert tokens.splits["train"][0] == ids_of()["train"][0]
    said = [str(one.message) for one in told]
    assert "shard-00000.safetensors: try 1 of 4 failed (ConnectionResetError: gone); again in 0 s" in said[0]
    assert "try 2 of 4 failed (OSError: it gave 100 bytes where 500 were asked for)" in said[1]
    starts = [start for _, start, _ in reads]
    assert starts[:3] == [0, 0, 0] and starts[3:] == list(range(500, 500 * (len(starts) - 2), 500))


def test_a_network_that_stays_away_is_told_after_four_tries(asked, cache):
    _, failing = asked
    tokens = open_token_source("memory://bucket/wiki")
    failing += [TimeoutError("no answer")] * 4
    with (
        pytest.warns(UserWarning, match="try"),
        pytest.raises(UsageError, match=r"wiki/shard-00000.safetensors cannot be read after 4 tries \(TimeoutError"),
    ):
        tokens.splits["train"][0]
    assert not kept(cache) and not list(cache.glob("*.part"))
    assert tokens.splits["train"][0] == ids_of()["train"][0]  # it came back


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("no access")])
def test_what_no_second_try_mends_is_told_at_once(asked, error):
    reads, failing = asked
    failing.append(error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"wiki/shards.json cannot be read \((it is not there|no access)\)"):
            open_token_source("memory://bucket/wiki")
    assert len(reads) == 1


def test_a_shard_that_is_missing_or_of_another_size_is_told_at_the_start(memory):
    memory.pipe_file("/bucket/wiki/" + NAME.format(4), b"short")
    with pytest.raises(
        UsageError, match=r"shard-00004.safetensors of --data memory://bucket/wiki has 5 bytes instead"
    ):
        open_token_source("memory://bucket/wiki")
    memory.rm_file("/bucket/wiki/" + NAME.format(4))
    with pytest.raises(UsageError, match=r"memory://bucket/wiki lacks shard-00004.safetensors, of 12 shards"):
        open_token_source("memory://bucket/wiki")


def test_a_shard_that_was_changed_does_not_reach_the_cache(memory, cache):
    path = "/bucket/wiki/" + NAME.format(0)
    content = memory.cat_file(path)
    memory.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    ids = open_token_source("memory://bucket/wiki").splits["train"]
    with pytest.raises(UsageError, match=r"shard-00000.safetensors did not arrive whole: the copy is damaged"):
        ids[0]
    assert not kept(cache) and not list(cache.glob("*.part"))
    assert ids[100] == ids_of()["train"][100]


def test_a_foreign_shard_of_the_same_size_is_told(memory, tmp_path):
    other = write(tmp_path / "other", ids_of(), metadata={"source": "abd", "name": "text"})
    memory.put(str(other / NAME.format(2)), "/bucket/wiki/" + NAME.format(2))
    with pytest.raises(UsageError, match="is not the file that it should be"):
        open_token_source("memory://bucket/wiki").splits["train"][200]


def test_verify_looks_at_the_copies_too(memory, cache):
    verify_token_source("memory://bucket/wiki")
    path = kept(cache)[3]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UsageError, match=f"{path.name} is damaged"):
        verify_token_source("memory://bucket/wiki")


def test_several_at_once_bring_a_shard_once(asked, monkeypatch):
    reads, _ = asked
    opened = [open_token_source("memory://bucket/wiki") for _ in range(6)]  # as so many processes would
    del reads[:]
    found = []
    threads = [threading.Thread(target=lambda one=one: found.append(one.splits["train"][5])) for one in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ids_of()["train"][5]] * 6 and [name for name, *_ in reads] == [NAME.format(0)]


def test_more_than_the_cache_may_hold_is_refused_before_it_is_brought(memory, cache, monkeypatch):
    monkeypatch.setenv("FIVESTEP_REMOTE_GB", "0.000005")
    for url in ("memory://bucket/wiki", "memory://bucket/one.safetensors"):
        if "one" in url:
            monkeypatch.setenv("FIVESTEP_REMOTE_GB", "0.000001")
        with pytest.raises(UsageError, match=r"has 0.0 GB, but the cache .* set FIVESTEP_REMOTE_GB to more"):
            open_token_source(url)
    assert not cache.exists()
    for bad in ("many", "0", "-1", "nan"):
        monkeypatch.setenv("FIVESTEP_REMOTE_GB", bad)
        with pytest.raises(UsageError, match="must be a number of GB above 0"):
            open_token_source("memory://bucket/wiki")


def test_what_was_used_longest_ago_makes_room(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes(1000))
        os.utime(tmp_path / f"{number}.safetensors", (0, [7, 9, 3, 8, 5][number]))
    (tmp_path / "other.json").write_bytes(bytes(10_000))
    monkeypatch.setenv("FIVESTEP_REMOTE_GB", "0.000004")
    make_room(tmp_path, 1500)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.safetensors",
        "3.safetensors",
        "other.json",
    ]


def test_a_copy_that_is_used_counts_as_used_now(memory, cache):
    open_token_source("memory://bucket/wiki").splits["train"][0]
    (path,) = kept(cache)
    os.utime(path, (0, 7))
    open_token_source("memory://bucket/wiki").splits["train"][0]
    assert path.stat().st_mtime > 10**9


def test_a_map_outlives_its_file_and_a_shard_that_made_room_is_brought_again(memory, cache):
    ids = open_token_source("memory://bucket/wiki").splits["train"]
    ids.maps.most_open = 1
    assert np.array_equal(ids[:300], ids_of()["train"][:300])
    for path in kept(cache):
        path.unlink()
    assert np.array_equal(ids[200:300], ids_of()["train"][200:300]) and not kept(cache)
    assert np.array_equal(ids[:300], ids_of()["train"][:300]) and len(kept(cache)) == 3


def test_without_the_library_or_the_driver_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match=r"s3:// that is not installed: pip install 'fivestep\[remote\]' s3fs"):
        open_token_source("s3://bucket/wiki")
    with pytest.raises(UsageError, match="cannot be opened .*nosuch"):
        open_token_source("nosuch://bucket/wiki")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match=r"needs fsspec: pip install 'fivestep\[remote\]'"):
        open_token_source("s3://bucket/wiki")


def test_secrets_of_a_url_are_not_shown(memory):
    with pytest.raises(UsageError) as error:
        Remote("memory://me:secret@bucket/wiki?signature=abc").read("x", 10)
    assert "secret" not in str(error.value) and "signature" not in str(error.value)
    assert is_url("s3://a") and not is_url("C:\\text") and not is_url("a.txt") and not is_url("a://b"[1:])


class Ranged(SimpleHTTPRequestHandler):
    """A web server that gives ranges, as object stores do."""

    ranged = True

    def do_GET(self):
        path, wanted = self.translate_path(self.path), self.headers.get("Range")
        if not self.ranged or wanted is None or not os.path.isfile(path):  # noqa: PTH113
            return super().do_GET()
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read()
        start, stop = wanted.removeprefix("bytes=").split("-")
        part = content[int(start) : int(stop) + 1 if stop else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp", reason="http needs the extra remote")
    write(tmp_path / "web" / "wiki", ids_of(), most=600)
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranged, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    thread.join()
    served.server_close()


def test_over_http(server, monkeypatch):
    tokens = open_token_source(f"{server}/wiki")
    assert np.array_equal(tokens.splits["train"][:], ids_of()["train"])
    with pytest.raises(UsageError, match=r"other/shards.json cannot be read \(it is not there\)"):
        open_token_source(f"{server}/other")


def test_a_list_that_is_another_file_is_told(memory):
    memory.pipe_file(f"/bucket/bad/{LIST}", json.dumps({"format": "other"}).encode())
    with pytest.raises(UsageError, match=r"memory://bucket/bad/shards.json is no list of shards"):
        open_token_source("memory://bucket/bad")
