"""Workflows as the server takes them: read from whatever file they come in, set, and checked before anything runs.

The host ignores an input that a node does not have and makes a whole number of 2.5 and a yes of "false". The browser
never sends such things; files made by hand or by scripts do, so they are refused here. Everything that goes wrong is a
WorkflowError of one line. Needs the standard library, and inside its functions Pillow, PyAV and comfy-cli.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOWS = PROJECT / "workflows"
HOW_TO_SAVE = "in the browser: Workflow > Export, or Export (API)"
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
PNG_TEXT_AFTER = b"comf"  # where the host keeps the texts of an animated PNG
BROWSER_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
# widgets of the browser that older versions of it sent along with the inputs of a node
BROWSER_WIDGETS = {"upload", "audioUI", "preview_markdown", "preview_text", "previewMode", "control_after_generate"}
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
MUTED, BYPASSED = 2, 4
LONGEST_LINE = 1500  # letters of an error: names in a damaged file may be thousands of letters long


class WorkflowError(RuntimeError):
    """A workflow that cannot run or did not finish; one line that names the file or the node and what to do."""

    def __init__(self, message: str):
        line = " ".join(str(message).split()).encode("utf-8", "backslashreplace").decode()
        half = LONGEST_LINE // 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")


@contextlib.contextmanager
def about(path: Path | str) -> Iterator[None]:
    """What is wrong with a workflow becomes a WorkflowError that begins with the name of its file."""
    try:
        yield
    except WorkflowError as problem:
        raise WorkflowError(problem if str(path) in str(problem) else f"{path}: {problem}") from problem


# --------------------------------------------------------------------------------------------------- from a file


def read_workflow(path: Path) -> dict:
    """The workflow in a file: JSON, plain or for the API or wrapped, or a picture or video that ComfyUI saved."""
    if path.is_dir():
        names = sorted(f.name for f in path.glob("*.json"))
        raise WorkflowError(f"{path}: is a folder; name a workflow in it" + (f", such as {names[0]}" if names else ""))
    if not path.is_file():
        names = ", ".join(sorted(f.stem for f in WORKFLOWS.glob("*.json")))
        raise WorkflowError(f"{path}: no such workflow; the shipped ones are {names}, each {WORKFLOWS}/NAME.json")
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(PICTURES) or head[8:12] == b"WEBP":
            return _first_workflow(_texts_of_picture(path), path)
        if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3"):
            return _first_workflow(_texts_of_video(path), path)
        return _from_json(path)
    except OSError as problem:
        raise WorkflowError(f"{path}: cannot be read ({problem})") from problem


def _from_json(path: Path) -> dict:
    from lyra_core import files

    try:
        text = files.read_text(path)
        if not text.strip():
            raise ValueError(f"{path}: is empty; save the workflow again, {HOW_TO_SAVE}")
        value = files.parse_json(text, path)
    except ValueError as problem:
        raise WorkflowError(problem) from problem
    found = _unwrapped(value)
    if found is None:
        what = f"an object with {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) and value else value
        raise WorkflowError(f"{path}: holds no ComfyUI workflow, but {str(what)[:120]}; save one {HOW_TO_SAVE}")
    return _well_formed(found, path)


def _first_workflow(texts: dict[str, str], path: Path) -> dict:
    """What a saved file was made with: the prompt as it ran, else the graph."""
    for name in ("prompt", "workflow"):
        with contextlib.suppress(ValueError, RecursionError):
            if (found := _unwrapped(json.loads(texts.get(name, "null")))) is not None:
                return _well_formed(found, path)
    raise WorkflowError(
        f"{path}: holds no workflow; ComfyUI writes it into the files that it saves, and many sites and messengers "
        f"remove it. Save the workflow itself, {HOW_TO_SAVE}"
    )


def _texts_of_picture(path: Path) -> dict[str, str]:
    """The texts that the host writes: PNG chunks, or EXIF entries "prompt:..." and "workflow:..."."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.format == "PNG":
                picture.seek(getattr(picture, "n_frames", 1) - 1)  # an animated one has them behind its last frame
            picture.load()
            found = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            for kind, chunk, *_ in getattr(picture, "private_chunks", ()):
                if kind == PNG_TEXT_AFTER:
                    key, _, text = chunk.partition(b"\0")
                    found[key.decode("latin-1")] = text.decode("latin-1")
            entries = [value for value in picture.getexif().values() if isinstance(value, str)]
    except Exception as problem:  # whatever Pillow's decoders make of damaged bytes
        raise WorkflowError(f"{path}: is a damaged picture ({problem}); take the workflow's .json") from problem
    for entry in entries:
        key, _, text = entry.partition(":")
        found.setdefault(key.lower(), text)
    return found


def _texts_of_video(path: Path) -> dict[str, str]:
    import av

    try:
        with av.open(str(path)) as container:
            return {key.lower(): text for key, text in container.metadata.items()}
    except av.FFmpegError as problem:
        raise WorkflowError(f"{path}: is a damaged video ({problem}); take the workflow's .json") from problem


def _unwrapped(value: object, depth: int = 0) -> dict | None:
    """The graph or prompt inside what clients of the API, histories and pictures put around it; None if there is none."""
    if depth > 5:
        return None
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            return _unwrapped(json.loads(value), depth + 1)
    if isinstance(value, list):  # an entry of the server's history
        return next((found for item in value if (found := _unwrapped(item, depth + 1))), None)
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("nodes"), list):
        return value
    if any(isinstance(node, dict) and "class_type" in node for node in value.values()):
        return {key: node for key, node in value.items() if key not in ("extra_data", "client_id", "prompt_id", "version")}
    inner = [value[key] for key in ("prompt", "output", "workflow", "extra_data", "extra_pnginfo") if key in value]
    if not inner and len(value) == 1:  # the server's history, of one run
        inner = list(value.values())
    return next((found for item in inner if (found := _unwrapped(item, depth + 1))), None)


def _well_formed(workflow: dict, path: Path) -> dict:
    """The same, if every node has what nodes have."""
    if "nodes" in workflow and isinstance(workflow["nodes"], list):
        if not isinstance(workflow.get("links"), list):
            raise WorkflowError(f"{path}: has nodes but no list of links; save it again, {HOW_TO_SAVE}")
        definitions = workflow.get("definitions") or {}
        inner = (definitions.get("subgraphs") or []) if isinstance(definitions, dict) else None
        if not isinstance(inner, list) or not all(isinstance(graph, dict) and isinstance(graph.get("id"), str) for graph in inner):
            raise WorkflowError(f"{path}: its subgraphs are {str(inner)[:60]}; save it again, {HOW_TO_SAVE}")
        for nodes in (workflow["nodes"], *(graph.get("nodes") or [] for graph in inner)):
            if not isinstance(nodes, list) or not all(isinstance(n, dict) and isinstance(n.get("type"), str) for n in nodes):
                raise WorkflowError(f"{path}: has a node without a type; save it again, {HOW_TO_SAVE}")
        return workflow
    for key, node in workflow.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise WorkflowError(f"{path}: {key!r} is no node, as it has no class_type; remove it, or save again, {HOW_TO_SAVE}")
        if not isinstance(node.setdefault("inputs", {}), dict):
            raise WorkflowError(f"{path}: the inputs of node {key}, {node['class_type']}, are not an object")
    return workflow


# ---------------------------------------------------------------------------------------------- for the server


def to_api_format(workflow: dict, object_info: dict) -> dict:
    """Any workflow as the prompt the server takes; comfy-cli's converter, the same result as the browser's."""
    from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

    if not isinstance(workflow.get("nodes"), list):
        return without_browser_nodes(copy.deepcopy(workflow), object_info)
    with _complaints("comfy_cli.workflow_to_api") as said:
        try:
            prompt = convert_ui_to_api(workflow, object_info)
        except Exception as problem:  # of a graph that the browser would not have saved it also makes TypeErrors and others
            reason = str(problem) if isinstance(problem, WorkflowConversionError) else f"it is damaged ({problem!r})"
            raise WorkflowError(f"the workflow cannot be converted: {reason}; save it again, {HOW_TO_SAVE}") from problem
    # it goes on without a node that it did not understand; group nodes, of which it warns too, have no class
    if lost := [text for text in said if "group nodes" not in text]:
        raise WorkflowError(f"the workflow cannot be converted: {'; '.join(lost)}. Open it in the browser and save it again")
    return without_browser_nodes(prompt, object_info)


@contextlib.contextmanager
def _complaints(name: str) -> Iterator[list[str]]:
    """What a logger says at warning or above, which is then not printed."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reason = f" ({record.exc_info[1]})" if record.exc_info else ""
            said.append(record.getMessage() + reason)

    logger, listener = logging.getLogger(name), Listener(logging.WARNING)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


def is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and isinstance(value[1], int)


def without_browser_nodes(prompt: dict, object_info: dict) -> dict:
    """The prompt without nodes of which the server knows nothing and on which nothing hangs; reroutes are followed."""
    unknown = {key: node for key, node in prompt.items() if node["class_type"] not in object_info}

    def source(link: list) -> object:
        for _ in unknown:
            node = unknown.get(str(link[0]), {})
            if node.get("class_type") not in ("Reroute", "PrimitiveNode"):
                break
            values = list(node["inputs"].values())
            if not values:
                break
            if not is_link(values[0]):
                return values[0]
            link = values[0]
        return [str(link[0]), link[1]]

    for key, node in prompt.items():
        if key not in unknown:
            node["inputs"] = {name: source(v) if is_link(v) else v for name, v in node["inputs"].items()}
    needed = {v[0] for key, node in prompt.items() if key not in unknown for v in node["inputs"].values() if is_link(v)}
    dropped = {
        key
        for key, node in unknown.items()
        if key not in needed and (node["class_type"] in BROWSER_ONLY or not any(map(is_link, node["inputs"].values())))
    }
    return {key: node for key, node in prompt.items() if key not in dropped}


def muted_outputs(workflow: dict, object_info: dict) -> list[str]:
    """The nodes that would save or show something but are switched off in the file; with those of subgraphs."""
    inner = {graph.get("id"): graph for graph in (workflow.get("definitions") or {}).get("subgraphs") or []}

    def walk(nodes: list[dict], off: bool, seen: tuple = ()) -> Iterator[str]:
        for node in nodes:
            kind, silent = node.get("type"), off or node.get("mode") in (MUTED, BYPASSED)
            if kind in inner and kind not in seen:
                yield from walk(inner[kind].get("nodes") or [], silent, (*seen, kind))
            elif silent and object_info.get(kind, {}).get("output_node"):
                yield f"node {node.get('id')}, {kind}"

    return list(walk(workflow.get("nodes") or [], False))


# ------------------------------------------------------------------------------------------------------ the inputs


def named(key: str, prompt: dict) -> str:
    """How errors call a node: its id, its type, and its title if that says more."""
    node = prompt.get(key, {})
    kind, title = node.get("class_type", "unknown"), (node.get("_meta") or {}).get("title")
    return f'node {key} "{title}", {kind}' if title and title != kind else f"node {key}, {kind}"


def input_specs(schema: dict, inputs: dict) -> dict[str, list]:
    """What the server says of every input that a node has now: those of dynamic combos follow what is chosen."""

    def expand(groups: dict, prefix: str) -> Iterator[tuple[str, list]]:
        for group in ("required", "optional"):
            for name, spec in (groups.get(group) or {}).items():
                yield prefix + name, spec
                if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                    for option in spec[1].get("options", ()):
                        if option["key"] == inputs.get(prefix + name):
                            yield from expand(option["inputs"], f"{prefix}{name}.")

    return dict(expand(schema["input"], ""))


def options_of(spec: list) -> list | None:
    """What a combo offers; None for other inputs."""
    if isinstance(spec[0], list):
        return spec[0]
    more = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        return [option["key"] for option in more.get("options", ())]
    return more.get("options", []) if spec[0] == "COMBO" else None


def apply_settings(prompt: dict, settings: list[str], input_folder: Path, object_info: dict) -> None:
    """NODE.INPUT=VALUE, where NODE is an id, a type or a title; @PATH copies a file into the input folder first."""
    for setting in settings:
        target, separator, value = setting.partition("=")
        if not separator or "." not in target:
            raise WorkflowError(f"--set {setting}: expected NODE.INPUT=VALUE")
        node, name = _target(prompt, target, setting)
        schema = object_info.get(node["class_type"], {"input": {}})
        specs = input_specs(schema, node["inputs"])
        if name not in node["inputs"] and name not in specs:
            known = sorted({*node["inputs"], *specs})
            raise WorkflowError(f"--set {setting}: {node['class_type']} has no input {name!r}, only {known}")
        spec = specs.get(name)
        if is_link(node["inputs"].get(name)) and spec and spec[0] not in WIDGETS and not isinstance(spec[0], list):
            raise WorkflowError(f"--set {setting}: this input takes the {spec[0]} of another node, not a value")
        if value.startswith("@"):
            node["inputs"][name] = upload(value[1:], input_folder)
        else:
            node["inputs"][name] = typed(value, spec, setting) if spec else value
        if spec and spec[0] == "COMFY_DYNAMICCOMBO_V3":
            _choose(node["inputs"], name, input_specs(schema, node["inputs"]))


def _target(prompt: dict, target: str, setting: str) -> tuple[dict, str]:
    """The node and the input that NODE.INPUT means; both may have dots in them."""
    splits = [(target[:i], target[i + 1 :]) for i, letter in enumerate(target) if letter == "."]
    for name, inner in reversed(splits):
        nodes = {k: n for k, n in prompt.items() if name in (k, n["class_type"], (n.get("_meta") or {}).get("title"))}
        if len(nodes) == 1:
            return next(iter(nodes.values())), inner
        if nodes:
            raise WorkflowError(
                f"--set {setting}: {len(nodes)} nodes are called {name!r}; say which by its id, one of {', '.join(nodes)}"
            )
    names = sorted({(node.get("_meta") or {}).get("title") or node["class_type"] for node in prompt.values()})
    raise WorkflowError(
        f"--set {setting}: no node is called {splits[0][0]!r}, or it is muted in the file; this workflow has {names}"
    )


def _choose(inputs: dict, name: str, specs: dict[str, list]) -> None:
    """Another choice of a dynamic combo has other inputs: those of the last one go, its own begin with their defaults."""
    for old in [key for key in inputs if key.startswith(f"{name}.") and key not in specs]:
        del inputs[old]
    for key, spec in specs.items():
        if key.startswith(f"{name}.") and key not in inputs and len(spec) > 1 and "default" in spec[1]:
            inputs[key] = spec[1]["default"]


def typed(text: str, spec: list, setting: str) -> object:
    """A text of the command line as the value that an input takes; the server checks range and options."""
    kind = spec[0]
    if kind == "BOOLEAN":
        if text.lower() not in YES + NO:
            raise WorkflowError(f"--set {setting}: {text!r} is neither true nor false")
        return text.lower() in YES
    if kind in ("INT", "FLOAT"):
        try:
            return int(text) if kind == "INT" else float(text)
        except ValueError:
            what = "whole number" if kind == "INT" else "number"
            raise WorkflowError(f"--set {setting}: {text!r} is no {what}") from None
    return next((option for option in options_of(spec) or () if str(option) == text), text)


def upload(path: str, input_folder: Path) -> str:
    source = Path(path).expanduser()
    if not source.is_file():
        raise WorkflowError(f"{source}: no such file")
    input_folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}{source.suffix}"
    shutil.copyfile(source, input_folder / name)
    return name


# ------------------------------------------------------------------------------------------------------ the checks


def check(prompt: dict, object_info: dict) -> None:
    """WorkflowError if a node is not installed or has something that the server would silently ignore or change."""
    problems = [
        f"{named(key, prompt)}: {problem}"
        for key, node in prompt.items()
        for problem in _problems(node, prompt, object_info)
    ]
    if problems:
        raise WorkflowError("; ".join(problems))


def _problems(node: dict, prompt: dict, object_info: dict) -> Iterator[str]:
    schema = object_info.get(node["class_type"])
    if schema is None:
        own = node["class_type"].startswith("Lyra2")
        yield (
            "this ComfyUI has no such node; "
            + ("this pack is older than the workflow, or did not load: see the server's log" if own else "")
            + ("" if own else "install the pack that brings it, or take the node out of the workflow")
        )
        return
    specs = input_specs(schema, node["inputs"])
    # of these the server alone knows the inputs: growing lists, and choices that are none
    rows = tuple(
        f"{name}."
        for name, spec in specs.items()
        if str(spec[0]).startswith("COMFY_")
        and (spec[0] != "COMFY_DYNAMICCOMBO_V3" or node["inputs"].get(name) not in options_of(spec))
    )
    strict = not schema["python_module"].startswith("custom_nodes.") or node["class_type"].startswith("Lyra2")
    for name, value in node["inputs"].items():
        if not isinstance(name, str):
            yield f"has an input called {name!r}, which is no name"
        elif name in specs:
            yield from _bad_link(name, value, prompt, object_info) if is_link(value) else _bad_value(name, value, specs[name])
        elif name.startswith(rows):
            yield from _bad_link(name, value, prompt, object_info) if is_link(value) else ()
        elif strict and name not in BROWSER_WIDGETS:  # nodes of other packs may take what only their browser part knows
            yield f"has no input {name!r} (value {str(value)[:60]!r}), only {sorted(specs)}"


def _bad_link(name: str, link: list, prompt: dict, object_info: dict) -> Iterator[str]:
    key, slot = str(link[0]), link[1]
    if key not in prompt:
        yield f"input {name!r} is linked to node {key}, which the workflow does not have"
        return
    outputs = object_info.get(prompt[key]["class_type"], {}).get("output")
    if outputs is not None and not 0 <= slot < len(outputs):
        yield f"input {name!r} is linked to output {slot} of {named(key, prompt)}, which has {len(outputs)}"


def _bad_value(name: str, value: object, spec: list) -> Iterator[str]:
    if isinstance(value, dict) and "__value__" in value:  # how lists that are no links are sent
        value = value["__value__"]
    if spec[0] == "INT" and isinstance(value, float) and value != int(value if math.isfinite(value) else 0):
        yield f"input {name!r} is {value!r}, which is no whole number"
    if spec[0] == "COMFY_DYNAMICCOMBO_V3" and value not in options_of(spec):  # the host checks plain combos only
        yield f"input {name!r} is {value!r}, which is not one of {options_of(spec)}"
    if spec[0] in ("INT", "FLOAT") and isinstance(value, bool):
        yield f"input {name!r} is {value!r}, which is no number"
    if spec[0] == "FLOAT" and isinstance(value, (float, str)) and str(value).lower().lstrip("+-") in ("nan", "inf", "infinity"):
        yield f"input {name!r} is {value!r}, which is no finite number"
    if spec[0] == "BOOLEAN" and value not in (True, False):
        yield f"input {name!r} is {value!r}, which is neither true nor false"
    if spec[0] == "STRING" and not isinstance(value, (str, int, float)):
        yield f"input {name!r} is {str(value)[:60]!r}, which is no text"


def refusal(answer: dict, prompt: dict) -> str:
    """What the server says of a prompt that it does not take, or only in part, in one line."""
    lines = []
    for key, problem in answer.get("node_errors", {}).items():
        lines += [f"{named(key, prompt)}: {_reason(error)}" for error in problem["errors"]]
    if not lines:
        error = answer.get("error") or {}
        lines = [f"{error.get('message', 'the server refused the workflow')} {error.get('details', '')}"]
        if error.get("type") == "prompt_no_outputs":
            lines = ["nothing in this workflow saves or shows anything; add a node that does, such as Save Image"]
    return "; ".join(dict.fromkeys(lines))


def _reason(error: dict) -> str:
    more = error.get("extra_info") or {}
    details = error.get("details") or ""
    name = more.get("input_name", "")
    if error.get("type") == "required_input_missing":
        return f"{error['message']}: {name or details} (nothing is linked to it, or what was is muted or missing)"
    if error.get("type") == "exception_during_validation":
        return f"{error['message']}: {more.get('exception_type', '')} {details}"
    return f"{error['message']}: {details}"
