"""The checks of a card's metadata that a Hub makes before it takes a commit."""

import re
from typing import Any

import yaml


REPO_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
LICENSES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
    "bsl-1.0 cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 "
    "cdla-permissive-2.0 creativeml-openrail-m ecl-2.0 epl-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl "
    "lgpl-2.1 lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail "
    "openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib other"
).split()
RELATIONS = ("finetune", "adapter", "merge", "quantized")
PIPELINES = (
    "any-to-any audio-classification automatic-speech-recognition depth-estimation document-question-answering "
    "feature-extraction fill-mask image-classification image-feature-extraction image-segmentation image-text-to-text "
    "image-to-image image-to-text image-to-video mask-generation object-detection question-answering "
    "sentence-similarity summarization text-classification text-generation text-to-image text-to-video "
    "token-classification translation unconditional-image-generation video-classification video-text-to-text "
    "video-to-video visual-document-retrieval visual-question-answering zero-shot-classification "
    "zero-shot-image-classification zero-shot-object-detection other"
).split()


def read(content: str) -> dict[str, Any] | None:
    """The metadata between the two lines `---` at the top of a README.

    Raises:
        yaml.YAMLError: if it is no YAML.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README."""
    try:
        metadata = read(content)
    except yaml.YAMLError as error:
        return [f"YAML error: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"], []
    errors = []

    def check(field: str, good: Any, expected: str) -> None:
        if field in metadata and not good(metadata[field]):
            errors.append(f'"{field}" must be {expected}, found {metadata[field]!r}')

    def ids(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(item, str) and REPO_ID.fullmatch(item) for item in values)

    def words(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)

    def language(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(
            isinstance(item, str) and re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", item)
            for item in values
        )

    check("license", lambda value: value in LICENSES, "a known license")
    check("tags", words, "a list of words")
    check("language", language, "a language code or a list of them")
    if repo_type == "model":
        check("base_model", ids, "a model id or a list of them")
        check("base_model_relation", lambda value: value in RELATIONS, f"one of {', '.join(RELATIONS)}")
        check("datasets", lambda value: isinstance(value, list) and ids(value), "a list of dataset ids")
        check("metrics", words, "a list of words")
        check("library_name", lambda value: isinstance(value, str), "a word")
        check("pipeline_tag", lambda value: value in PIPELINES, "a known pipeline")
        errors += _result_problems(metadata.get("model-index", []))
    warnings = [] if "license" in metadata else ["no license"]
    return errors, warnings


def _result_problems(index: Any) -> list[str]:
    """What is wrong with a `model-index`."""
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        if not isinstance(model.get("results"), list):
            errors.append(f'"{where}.results" is required')
            continue
        for j, result in enumerate(model["results"]):
            place = f"{where}.results[{j}]"
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append(f'"{place}.task.type" is required')
            dataset = result.get("dataset", {})
            if not isinstance(dataset.get("name"), str) or not isinstance(dataset.get("type"), str):
                errors.append(f'"{place}.dataset" needs a name and a type')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{place}.metrics" must be a list with something in it')
                continue
            for metric in metrics:
                if not isinstance(metric.get("type"), str) or not isinstance(
                    metric.get("value"), int | float | str | list
                ):
                    errors.append(f'"{place}.metrics" needs a type and a value each, found {metric!r}')
    return errors
