"""Every job killed, starved of disk, fed from a bad disk and slowed down: the short form of
`make torture`. FASTEMBED_TORTURE_SEED chooses other moments."""

from __future__ import annotations

import itertools
import os

import jobs
import pytest
from bench import Bench, Counts, seeds

SEED = int(os.environ.get("FASTEMBED_TORTURE_SEED", 8))
STORIES = {"kills": 1, "bad_disk": 2, "bad_input": 1, "hiccups": 1, "signals": 1, "crowd": 1}


@pytest.mark.parametrize("torment", STORIES)
@pytest.mark.parametrize("name", jobs.JOBS)
def test_nothing_is_lost_and_every_byte_is_the_same(benches, name, torment):
    bench = benches(name)
    if torment == "crowd" and not bench.job.shards:
        pytest.skip(f"{name} has no --shard")
    bench.counts = Counts()
    for seed in itertools.islice(seeds(SEED), STORIES[torment]):
        getattr(bench, torment)(seed)
    counts = bench.counts
    assert counts.stories == STORIES[torment] and counts.samples and counts.bytes
    assert counts.kills or counts.injected or torment == "crowd"  # which may outrun its kills


@pytest.mark.parametrize("torment", STORIES)
def test_multichannel_with_a_real_postgres(fault_server, database, tmp_path, torment):
    bench = Bench(jobs.with_postgres(database), fault_server, tmp_path)
    for seed in itertools.islice(seeds(SEED), STORIES[torment]):
        getattr(bench, torment)(seed)
    assert bench.counts.stories == STORIES[torment]


def test_the_checks_see_what_they_look_for(benches):
    """A changed byte, a row without its file, a lost row, a stray file: each is found."""
    bench = benches("multichannel npy")
    out = bench.new_output()
    assert bench.run(out).status == 0
    bench.check_complete(out)
    committed = bench.check(out)
    index = out / "image_embeddings.tsv"
    first, *_ = [path for path in sorted(out.iterdir()) if path.name.startswith("emb_")]
    content, rows = first.read_bytes(), index.read_bytes()

    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssertionError, match="committed with other bytes"):
        bench.check(out)
    first.unlink()
    with pytest.raises(FileNotFoundError):
        bench.check(out)
    first.write_bytes(content)
    lines = rows.splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AssertionError, match="lost what was committed"):
        bench.check(out, committed)
    index.write_bytes(rows + lines[-1])
    with pytest.raises(AssertionError, match="a row twice"):
        bench.check(out)
    index.write_bytes(rows)
    (out / ".something.tmp").touch()
    bench.check(out)  # a temporary file is allowed until the run is complete
    with pytest.raises(AssertionError, match="half-written"):
        bench.check_complete(out)
