"""How fast text becomes token shards, and how long a batch takes to read.

    python benchmarks/data_pipeline.py --data texts.jsonl.xz [--megabytes 16] [--repeats 7] [--whole]

Preparing is compared with the bare tokenizer's `encode_batch` on the same documents, already in memory,
with as many threads as `prepare` has workers; the two take turns, and the number is the ratio of the
medians. On a machine with other work (`load_before` above 0) the ratio by processor time says more. Reading
is the time `TrainingSamples.batch` takes at random positions. `--whole` also prepares the whole file once.
Writes benchmarks/results/data_pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "data_pipeline.json"
BATCHES = [
    {"sequence_length": 256, "rows": 32, "recipe": "packed", "document_masking": False},
    {"sequence_length": 1024, "rows": 32, "recipe": "packed", "document_masking": False},
    {"sequence_length": 1024, "rows": 32, "recipe": "packed", "document_masking": True},
    {"sequence_length": 256, "rows": 32, "recipe": "galore", "document_masking": False},
]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def processor_seconds() -> float:
    """Time on the processors so far, of this process and those it started; other work hardly changes it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def part_of(path: Path, megabytes: int, folder: Path) -> tuple[Path, list[str]]:
    """The first `megabytes` of text of a .jsonl.xz file, as such a file and in memory."""
    lines, texts, size = [], [], 0
    with lzma.open(path) as stream:
        for line in stream:
            lines.append(line)
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= megabytes * 1e6:
                break
    part = folder / "part.jsonl.xz"
    part.write_bytes(lzma.compress(b"".join(lines)))
    return part, texts


def time_preparing(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    from llmnorm.data import load_or_train_tokenizer, prepare

    part, texts = part_of(arguments.data, arguments.megabytes, folder)
    tokenizer = load_or_train_tokenizer(
        {"train": "bpe", "vocab_size": arguments.vocab_size}, str(part), folder
    )
    backend = tokenizer.backend_tokenizer
    size = sum(len(text.encode()) for text in texts)
    bare, whole, bare_cpu, whole_cpu = [], [], [], []
    for repeat in range(arguments.repeats):
        start, start_cpu = time.perf_counter(), processor_seconds()
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        bare.append(size / 1e6 / (time.perf_counter() - start))
        bare_cpu.append(processor_seconds() - start_cpu)
        num_tokens = sum(len(encoding) for encoding in encodings) + len(texts)
        del encodings
        start, start_cpu = time.perf_counter(), processor_seconds()
        dataset = prepare(
            str(part), tokenizer, folder / f"repeat-{repeat}", workers=arguments.workers, progress=False
        )
        whole.append(size / 1e6 / (time.perf_counter() - start))
        whole_cpu.append(processor_seconds() - start_cpu)
        assert dataset.num_tokens == num_tokens
        print(f"encode_batch {bare[-1]:.2f} MB/s, prepare {whole[-1]:.2f} MB/s", file=sys.stderr)
    result = {
        "text_megabytes": size / 1e6,
        "documents": len(texts),
        "workers": arguments.workers,
        "repeats": arguments.repeats,
        "encode_batch_megabytes_per_second": spread(bare),
        "prepare_megabytes_per_second": spread(whole),
        "ratio": statistics.median(whole) / statistics.median(bare),
        "encode_batch_processor_seconds": spread(bare_cpu),
        "prepare_processor_seconds": spread(whole_cpu),
        "ratio_by_processor_time": statistics.median(bare_cpu) / statistics.median(whole_cpu),
        "ratio_of_each_repeat": [ours / theirs for ours, theirs in zip(whole, bare, strict=True)],
    }
    return result, tokenizer, dataset


def time_reading(dataset: Any, repeats: int = 300) -> list[dict[str, Any]]:
    import numpy as np

    from llmnorm.data import TrainingSamples

    results = []
    generator = np.random.default_rng(0)
    for batch in BATCHES:
        batch = dict(batch)
        rows = batch.pop("rows")
        samples = TrainingSamples(dataset, **batch, seed=0, pad_token_id=0)
        seconds = []
        for first in generator.integers(0, 10 * samples.num_samples, repeats).tolist():
            start = time.perf_counter()
            samples.batch(np.arange(first, first + rows))
            seconds.append(time.perf_counter() - start)
        milliseconds = sorted(1e3 * second for second in seconds)
        results.append(
            {
                **batch,
                "rows": rows,
                "milliseconds": {
                    "median": statistics.median(milliseconds),
                    "99th_percentile": milliseconds[int(0.99 * repeats)],
                },
            }
        )
    return results


def prepare_whole(arguments: argparse.Namespace, tokenizer: Any, folder: Path) -> dict[str, Any]:
    from llmnorm.data import prepare

    start = time.perf_counter()
    dataset = prepare(str(arguments.data), tokenizer, folder, workers=arguments.workers, progress=False)
    seconds = time.perf_counter() - start
    dataset.verify(tokenizer, len(tokenizer))
    counts = ("documents", "tokens", "words", "bytes")
    return {
        "file": arguments.data.name,
        **{count: dataset.manifest[count] for count in counts},
        "shards": len(dataset.manifest["shards"]),
        "seconds": seconds,
        "megabytes_per_second": dataset.num_bytes / 1e6 / seconds,
    }


def processor() -> str:
    described = Path("/proc/cpuinfo")
    names = (
        [line for line in described.read_text().splitlines() if "model name" in line]
        if described.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".jsonl.xz file with a field `text`")
    parser.add_argument("--megabytes", type=int, default=16, help="text to compare on")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--whole", action="store_true", help="also prepare the whole file")
    arguments = parser.parse_args()
    # Read when the library first starts its threads, so it must be set before any of it is used.
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import numpy
    import tokenizers

    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        preparing, tokenizer, dataset = time_preparing(arguments, folder)
        result = {
            "what": "prepare() against the bare tokenizer's encode_batch; reading batches of TrainingSamples",
            "command": f"python benchmarks/data_pipeline.py --data {arguments.data.name} "
            f"--megabytes {arguments.megabytes} --repeats {arguments.repeats} --vocab-size "
            f"{arguments.vocab_size} "
            f"--workers {arguments.workers}" + (" --whole" if arguments.whole else ""),
            "date": datetime.now(UTC).date().isoformat(),
            "device": {"processor": processor(), "cpus": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                "tokenizers": tokenizers.__version__,
                "numpy": numpy.__version__,
            },
            "load_before": load_before,
            "niceness": os.nice(0),
            "preparing": preparing,
            "reading": time_reading(dataset),
        }
        if arguments.whole:
            result["whole_file"] = prepare_whole(arguments, tokenizer, folder)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
