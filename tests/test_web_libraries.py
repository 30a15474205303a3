"""three.js and spark come out of the frontend's source map, and what has changed there is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lyra_core.exports import web_libraries
from lyra_core.exports.web_libraries import FILES, LibraryError, extract, find

NEWER = "comfyui-frontend-package==1.58.1"
TINY = {
    "three.core.js": "export const core = 1;",
    "three.module.js": "import { core } from './three.core.js';\nexport { core } from './three.core.js';\n",
    "TransformControls.js": " * import { X } from 'three/addons/controls/TransformControls.js';\nimport {\n\tcore\n} from 'three';\n",
    "Pass.js": "import { core } from 'three';\nexport const Pass = core;",
    "spark.module.js": 'import * as THREE from "three";\nimport { Pass } from "three/addons/postprocessing/Pass.js";\n',
}


def installed() -> Path:
    import comfyui_frontend_package

    return Path(comfyui_frontend_package.__file__).parent / "static"


@pytest.fixture(scope="module")
def newer(tmp_path_factory, request) -> Path:
    """The web root of a later frontend, out of pip's cache or the package index."""
    folder = request.config.cache.mkdir("frontend")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", NEWER, "-d", str(folder)]
        if subprocess.run(command, capture_output=True, timeout=300).returncode:
            pytest.skip(f"{NEWER} can't be had here")
        wheels = sorted(folder.glob("*.whl"))
    root = tmp_path_factory.mktemp("newer")
    with zipfile.ZipFile(wheels[-1]) as archive:
        archive.extractall(root, [name for name in archive.namelist() if "/vendor-three-" in name])
    return root / "comfyui_frontend_package" / "static"


def frontend(folder: Path, texts: dict[str, str], **changes) -> Path:
    """A web root whose map has these texts."""
    record = {"version": 3, "sources": [f"../x/{FILES[name]}" for name in texts], "sourcesContent": list(texts.values())}
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "vendor-three-abc.js.map").write_text(json.dumps({**record, **changes}))
    return folder


def specifiers(text: str) -> set[str]:
    """What a module imports, by another rule than the code's: statements without the comments."""
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return set(re.findall(r"""^\s*(?:import|export|\})[^'";]*?from\s*['"]([^'"]+)['"]""", code, flags=re.MULTILINE))


@pytest.mark.parametrize("which", ["installed", "newer"])
def test_the_five_files_come_out_of_a_real_frontend_and_import_only_each_other(which, request, tmp_path):
    root = installed() if which == "installed" else request.getfixturevalue("newer")
    texts = extract(find(root, tmp_path))
    assert list(texts) == list(FILES) and all(len(text) > 3000 for text in texts.values())
    assert {name: specifiers(text) for name, text in texts.items()} == {
        "three.core.js": set(),
        "three.module.js": {"./three.core.js"},
        "TransformControls.js": {"./three.module.js"},
        "Pass.js": {"./three.module.js"},
        "spark.module.js": {"./three.module.js", "./Pass.js"},
    }
    assert "SplatMesh" in texts["spark.module.js"] and "WebGLRenderer" in texts["three.module.js"]


def test_modules_are_relinked_and_nothing_else_in_them_changes(tmp_path):
    texts = extract(find(frontend(tmp_path / "root", TINY), tmp_path))
    assert texts["three.core.js"] == TINY["three.core.js"] and texts["three.module.js"] == TINY["three.module.js"]
    assert texts["TransformControls.js"] == TINY["TransformControls.js"].replace("} from 'three'", "} from './three.module.js'")
    assert texts["spark.module.js"].splitlines() == [
        'import * as THREE from "./three.module.js";',
        'import { Pass } from "./Pass.js";',
    ]


def test_without_a_map_the_files_of_a_folder_are_used(tmp_path):
    (tmp_path / "vendor").mkdir()
    for name, text in TINY.items():
        (tmp_path / "vendor" / name).write_text(text)
    found = find(tmp_path / "nothing", tmp_path / "vendor")
    assert extract(found) == extract(find(frontend(tmp_path / "root", TINY), tmp_path))
    (tmp_path / "vendor" / "Pass.js").unlink()
    with pytest.raises(LibraryError, match="js/vendor lacks Pass.js; put three.core.js"):
        find(tmp_path / "nothing", tmp_path / "vendor")


def without(name: str) -> dict[str, str]:
    return {other: text for other, text in TINY.items() if other != name}


@pytest.mark.parametrize(
    ("texts", "changes", "words"),
    [
        (without("Pass.js"), {}, "has 0 texts of three/examples/jsm/postprocessing/Pass.js"),
        (TINY, {"sourcesContent": [None] * 5}, "has 0 texts of three/build/three.core.js"),
        (TINY, {"sourcesContent": None}, "is no source map with contents"),
        (TINY, {"sources": []}, "is no source map with contents"),
        ({**TINY, "spark.module.js": 'import { x } from "fflate";\n'}, {}, "spark.module.js imports 'fflate'"),
        ({**TINY, "three.module.js": "export * from './three.tsl.js';\n"}, {}, "imports './three.tsl.js'"),
    ],
)
def test_a_frontend_that_changed_is_refused_with_what_to_do(tmp_path, texts, changes, words):
    with pytest.raises(LibraryError, match=f"(?s)({words}).*js/vendor"):
        extract(find(frontend(tmp_path, texts, **changes), tmp_path))


def test_a_map_that_is_no_json_is_refused(tmp_path):
    root = frontend(tmp_path, TINY)
    next(root.glob(web_libraries.MAPS)).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        extract(find(root, tmp_path))


def test_the_version_changes_with_the_file_and_only_with_it(tmp_path):
    root = frontend(tmp_path, TINY)
    before = find(root, tmp_path).version
    assert find(root, tmp_path).version == before
    file = next(root.glob(web_libraries.MAPS))
    file.write_text(file.read_text() + " ")
    assert find(root, tmp_path).version != before
    os.rename(file, file.with_name("vendor-three-def.js.map"))
    assert find(root, tmp_path).version != before
