"""The model card (README.md) of an exported repository, with metadata the Hub understands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmnorm.evaluation import held_out_numbers

SHOWN = ("loss", "perplexity", "word_perplexity", "bits_per_byte")
ARCHITECTURE_ROWS = (
    ("norm", "normalization"),
    ("attention", "attention"),
    ("hidden_size", "hidden size"),
    ("intermediate_size", "MLP width"),
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "attention heads"),
    ("num_key_value_heads", "key-value heads"),
    ("vocab_size", "vocabulary"),
    ("max_position_embeddings", "context"),
    ("tie_word_embeddings", "tied embeddings"),
)


def model_card(
    name: str,
    model_config: Mapping[str, Any],
    parameters: int,
    *,
    remote_code: bool,
    training_config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
) -> str:
    """Markdown under a YAML header: library, pipeline, tags, datasets, and held-out numbers.

    model_config: the exported config.json. remote_code: whether loading needs trust_remote_code.
    training_config: the resolved run configuration. metrics: final metrics, keyed as in metrics.jsonl.
    license and language describe the weights and are left out when not given: they are the owner's to choose.
    """
    from huggingface_hub import EvalResult, ModelCardData

    training_config, metrics = training_config or {}, metrics or {}
    norm = model_config.get("norm")
    windows = _windows(training_config)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="validation",
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(value, 6),
            metric_args=windows,
        )
        for dataset, values in held_out_numbers(metrics).items()
        for metric, value in values.items()
        if metric in SHOWN
    ]
    optimizer = (training_config.get("optimizer") or {}).get("name")
    tags = ["llmnorm", "pretraining", *(tag for tag in (norm, optimizer) if isinstance(tag, str))]
    header = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=_datasets(training_config) or None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()
    sections = [
        f"---\n{header}\n---\n",
        f"# {name}\n",
        _summary(model_config, parameters),
        _usage(name, remote_code),
        _evaluation(metrics, windows),
        _architecture(model_config, parameters),
        _training(training_config, metrics),
    ]
    return "\n".join(section for section in sections if section)


def with_section(card: str, section: str) -> str:
    """`card` with a `## ` section: in place of the one of the same title, or at its end."""
    title = section.split("\n", 1)[0]
    before, found, rest = card.partition(f"\n{title}\n")
    if not found:
        return f"{card.rstrip()}\n\n{section}"
    _, mark, after = rest.partition("\n## ")
    return f"{before.rstrip()}\n\n{section}" + (f"\n## {after}" if mark else "")


def _datasets(training_config: Mapping[str, Any]) -> list[str]:
    """Hub ids among the training sources: hf:allenai/c4:en -> allenai/c4. File names stay private."""
    sources = (training_config.get("data") or {}).get("train_files") or []
    sources = [sources] if isinstance(sources, str) else sources
    return sorted({source.split(":")[1] for source in sources if source.startswith("hf:")})


def _summary(config: Mapping[str, Any], parameters: int) -> str:
    norm = config.get("norm")
    norms = f" with `{norm}` normalization" if isinstance(norm, str) else ""
    return (
        f"A LLaMA-style causal language model of {_count(parameters)} parameters{norms}, trained with "
        "llmnorm. It is a base model: it continues text, has not been tuned to follow instructions, and "
        "reflects the text it was trained on.\n"
    )


def _usage(name: str, remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if remote_code else ""
    note = (
        "The model's code is in this repository, so loading asks for `trust_remote_code`; llmnorm itself is "
        "not needed.\n"
        if remote_code
        else "The weights are those of a stock transformers architecture: no extra code is needed.\n"
    )
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "path/to/{name}"  # or the Hub name of this repository\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n\n{note}"
    )


def _evaluation(metrics: Mapping[str, Any], windows: Mapping[str, Any]) -> str:
    found = held_out_numbers(metrics)
    if not found:
        return ""
    columns = [metric for metric in SHOWN if any(metric in values for values in found.values())]
    lines = ["| held-out set | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for dataset, values in found.items():
        cells = (f"{values[column]:.4f}" if column in values else "" for column in columns)
        lines.append(f"| {dataset} | " + " | ".join(cells) + " |")
    context = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in windows.items())
    return (
        "## Evaluation\n\n" + "\n".join(lines) + "\n\nLoss is in nats per token, weighted by tokens"
        f"{f' ({context})' if context else ''}; the data are named in `training_config.yaml`.\n"
    )


def _windows(training_config: Mapping[str, Any]) -> dict[str, Any]:
    """The context length and stride that the held-out numbers were measured with."""
    evaluation, data = training_config.get("evaluation") or {}, training_config.get("data") or {}
    context_length = evaluation.get("context_length") or data.get("sequence_length")
    windows = {"context_length": context_length, "stride": evaluation.get("stride")}
    return {key: value for key, value in windows.items() if value is not None}


def _architecture(config: Mapping[str, Any], parameters: int) -> str:
    rows = [("parameters", f"{parameters:,}")]
    rows += [(label, _cell(config[key])) for key, label in ARCHITECTURE_ROWS if config.get(key) is not None]
    return "## Architecture\n\n| | |\n|---|---|\n" + "".join(
        f"| {label} | {value} |\n" for label, value in rows
    )


def _training(training_config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if not training_config:
        return ""
    optimizer, train = training_config.get("optimizer") or {}, training_config.get("train") or {}
    data = training_config.get("data") or {}
    rows = [
        ("optimizer", optimizer.get("name")),
        ("learning rate", optimizer.get("lr")),
        ("schedule", (training_config.get("schedule") or {}).get("name")),
        ("steps", metrics.get("step") or train.get("max_steps")),
        ("batch (sequences)", train.get("global_batch_size")),
        ("sequence length", data.get("sequence_length")),
        ("precision", train.get("precision")),
        ("tokens", f"{metrics['tokens']:,}" if isinstance(metrics.get("tokens"), int) else None),
        ("seed", training_config.get("seed")),
    ]
    table = "".join(f"| {label} | {value} |\n" for label, value in rows if value is not None)
    return (
        f"## Training\n\n| | |\n|---|---|\n{table}\nEvery key is in `training_config.yaml`; versions and "
        "device are in `environment.json`.\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


def _count(parameters: int) -> str:
    for size, suffix in ((10**9, "billion"), (10**6, "million")):
        if parameters >= size:
            return f"{parameters / size:.3g} {suffix}"
    return f"{parameters:,}"
