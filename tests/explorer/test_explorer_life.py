"""The Explorer's life in the host's page: keys, undo, copies, tabs, reloads, lost lines and contexts, what is let go."""

from __future__ import annotations

import json
import shutil

import pytest

FRONTENDS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes2"])


HOST = """return {
    nodes: app.graph._nodes.length, links: [...(app.graph.links?.values?.() ?? Object.values(app.graph.links))].length,
    sidebar: app.extensionManager.sidebarTab?.activeSidebarTabId ?? null, offset: [...app.canvas.ds.offset], scale: app.canvas.ds.scale,
    selected: Object.keys(app.canvas.selected_nodes ?? {}).length, dialogs: document.querySelectorAll('.p-dialog, dialog[open]').length,
    undo: app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length,
    redo: app.extensionManager.workflow.activeWorkflow.changeTracker.redoQueue.length,
    modes: app.graph._nodes.map(n => n.mode).join(), same: app.graph._nodes.every((n, i) => n === window.nodesBefore?.[i]),
};"""
KEYS = [
    *"wasdqernmpghvcxtuioklfbj", ".", ",", "[", "]", "Delete", "Backspace", "Control+z", "Control+y", "Control+Shift+z", "Home", "Space",
    "1", "2", "3", "4", "Escape", "Tab",
]  # fmt: skip


@FRONTENDS
def test_no_key_in_the_view_or_on_a_button_moves_anything_of_the_host(page, graph, saved, vue):
    saved("keys")
    page.use(vue)
    page.load(graph("worlds/keys", grows=False))
    page.standing()
    page.focus()
    page.js("window.nodesBefore = [...app.graph._nodes];")
    before = page.js(HOST)
    for key in KEYS:
        page.focus() if page.x("document.activeElement !== x.panels.sink && !x.overlay") else None
        page.press(key)
        if page.x("Boolean(x.overlay)"):
            page.press("f")
    after = page.js(HOST)
    # b was pressed once: a recording began and ended, which is a change of the path like any other
    assert {**after, "undo": 0} == {**before, "undo": 0} and after["undo"] >= before["undo"]
    page.js("x.recording = null; x.playing = null; x.clearPath(); x.select(-1);")
    page.js("x.setKeys([{ R: [0, 0, 0, 1], T: [0, 0, 0.5], fov: 40 }]);")
    before = page.js(HOST)
    for key in ("w", "r", "m", "Delete", "Backspace", "Escape", "n"):
        page.button("Add key").focus()
        page.press(key)
    page.button("Add key").focus()
    page.press("Control+z")
    after = page.js(HOST)
    assert after["same"] and after["nodes"] == before["nodes"], "Ctrl+Z on a button is ours: the graph's nodes are the same objects"
    assert {**after, "undo": 0} == {**before, "undo": 0}
    assert page.x("x.plan.keys.length") == 0, "and it undid the key"
    page.press("Control+y")
    page.wait("x.plan.keys.length === 1")


@FRONTENDS
def test_the_wheel_zooms_the_graph_until_the_view_has_the_focus(page, graph, saved, vue):
    saved("keys")
    page.use(vue)
    page.load(graph("worlds/keys", grows=False))
    page.standing()
    page.js("document.activeElement?.blur();")
    box = page.tab.locator(".lyra2 .sink").bounding_box()
    page.tab.mouse.move(box["x"] + 200, box["y"] + 100)
    scale = page.js("return app.canvas.ds.scale;")
    page.tab.mouse.wheel(0, -100)
    page.tab.wait_for_function("s => app.canvas.ds.scale !== s", arg=scale)
    page.see()
    page.focus()
    scale, speed = page.js("return [app.canvas.ds.scale, x.flight.speed];")
    page.tab.mouse.wheel(0, -100)
    page.wait(f"x.flight.speed > {speed}")
    assert page.js("return app.canvas.ds.scale;") == scale


KEY = "{ R: [0, 0, 0, 1], T: [0.1, 0, 0.4], fov: 40 }"


@FRONTENDS
def test_the_path_survives_undo_copies_subgraphs_tabs_and_the_other_frontend(page, graph, saved, vue):
    state = saved("value")[-1]
    page.use(vue)
    page.load(graph("worlds/value"))
    page.standing()
    page.js(f"x.setKeys([{KEY}]);")
    text = page.x("x.textWidget.value")
    assert json.loads(text)["lyra2"]["from"] == state
    # saved and loaded again
    again = page.js("return app.graph.serialize();")
    page.load(again)
    page.standing()
    assert page.x("x.textWidget.value") == text
    # one prompt for the page and for the command line
    prompt = page.js("return (await app.graphToPrompt()).output;")
    explorer = next(node for node in prompt.values() if node["class_type"] == "Lyra2Explorer")
    assert explorer["inputs"]["path"] == text and set(explorer["inputs"]) == {"world", "folder", "path"}
    # a copy has the same path, and a root that nobody needs is let go
    page.js(
        "const node = app.graph._nodes.find(n => n.type === 'Lyra2Explorer'); app.canvas.selectItems?.([node]) ?? app.canvas.selectNode(node);"
        " app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();"
    )
    values = page.js("return app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').map(n => n.widgets.find(w => w.name === 'path').value);")
    assert values == [text, text]
    page.js("app.graph.remove(app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').at(-1));")
    # the graph's own undo
    page.js("const t = app.extensionManager.workflow.activeWorkflow.changeTracker; t.captureCanvasState(); x.clearPath(); ")
    assert page.x("JSON.parse(x.textWidget.value).path.length") == 0
    page.js("await app.extensionManager.workflow.activeWorkflow.changeTracker.undo();")
    page.wait(f"x.textWidget?.value === {json.dumps(text)} && x.plan.keys.length === 1")
    # into a subgraph and out again
    page.js(
        "const node = app.graph._nodes.find(n => n.type === 'Lyra2Explorer');"
        " const { subgraph } = app.graph.convertToSubgraph(new Set([node])); window.inner = subgraph;"
    )
    inner = page.js("return window.inner._nodes.find(n => n.type === 'Lyra2Explorer').widgets.find(w => w.name === 'path').value;")
    assert inner == text
    page.js("app.canvas.setGraph(window.inner);")
    page.wait(f"x?.textWidget?.value === {json.dumps(text)}")
    assert ":" in page.x("x.id"), "the server knows it by the ids of the subgraph around it"
    assert page.x("x.targets().map(({ node }) => node.type).join()") == "Lyra2PreviewChunks", "links lead out of the subgraph"
    page.js("app.canvas.setGraph(app.rootGraph ?? app.graph); window.inner = null;")
    # the other frontend
    page.load(again)
    page.use(not vue)
    page.wait(f"x?.textWidget?.value === {json.dumps(text)}")
    page.standing()
    assert page.contexts() == 1
    page.use(vue)


def test_a_fresh_page_asks_for_little_until_the_first_points_and_speaks_its_language(page_module, browser, server, graph, saved, project):
    saved("value")
    texts = {name: json.loads((project / "js" / "texts" / f"{name}.json").read_text(encoding="utf-8")) for name in ("zh", "ja")}
    page = page_module.ExplorerPage(browser, server)
    try:
        page.speak("zh")
        page.use(False)
        assert [request.url.rsplit("/", 1)[1] for request in page.asked()] == ["lyra2.js"], "nothing else until a view is seen"
        page.requests.clear()
        page.load(graph("worlds/value"))
        page.standing()
        asked = page.asked()
        assert len(asked) <= 6, [request.url for request in asked]
        assert sum(request.sizes()["responseBodySize"] for request in asked) <= 1e6
        for language in ("zh", "ja"):
            if language == "ja":
                page.tab.evaluate("() => window.app.extensionManager.setting.set('Comfy.Locale', 'ja')")
                assert page.js("return page.explorers.size;") == 1, "until it is loaded again, a page has one set of modules"
                page.speak("ja")
                page.load(graph("worlds/value"))
                page.standing()
            page.focus()
            page.press("2")
            page.wait("x.panel === 'path'")
            assert page.x("x.panels.growButton.textContent") == texts[language]["grow"]
            assert page.x("x.panels.sink.ariaLabel") == texts[language]["view3d"]
            assert texts[language]["starts"] in page.x("x.panels.panel.textContent")
            page.shot(f"speaks_{language}")
        assert page.errors == []
    finally:
        page.tab.evaluate("() => window.app.extensionManager.setting.set('Comfy.Locale', 'en')")
        page.tab.context.close()


def test_a_reload_of_the_page_goes_on_with_the_same_path_and_view(page, graph, saved):
    saved("value")
    page.use(False)
    page.load(graph("worlds/value"))
    page.standing()
    page.focus()
    page.hold("w", "x.flight.pose.T[2] > 0.2")
    page.wait("x.node.properties.lyra2?.view?.T[2] === x.flight.pose.T[2]")
    page.js(f"x.setKeys([{KEY}]);")
    text, pose = page.x("x.textWidget.value"), page.x("x.flight.pose")
    page.tab.wait_for_timeout(1500)  # the host keeps a draft of what was changed, a moment later
    page.tab.reload()
    page.ready()
    page.wait("x?.textWidget")
    page.standing()
    assert page.x("x.textWidget.value") == text and page.x("x.flight.pose") == pose


def test_tabs_and_twenty_loads_of_a_graph_refetch_nothing_and_leave_one_explorer(page, graph, saved):
    saved("value")
    page.use(False)
    made = graph("worlds/value", grows=False)
    page.load(made)
    page.standing()
    page.js(f"x.setKeys([{KEY}]); window.first = app.extensionManager.workflow.activeWorkflow; window.alive = [];")
    text = page.x("x.textWidget.value")
    page.tab.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.tab.wait_for_function("() => !document.querySelector('.lyra2')")
    page.requests.clear()
    page.tab.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait("x?.textWidget")
    page.standing()
    assert page.x("x.textWidget.value") == text and page.x("x.plan.keys.length") == 1
    assert not [request for request in page.asked() if "/points/" in request.url], "the points of a state are fetched once a page"
    page.js(
        "for (let i = 0; i < 20; i++) { page.explorers.forEach(made => window.alive.push(new WeakRef(made)));"
        " await app.loadGraphData(given[0]); await new Promise(done => setTimeout(done, 60)); }",
        made,
    )
    page.see()
    page.standing()
    left = page.js(
        "const left = () => window.alive.map(ref => ref.deref()).filter(made => made && !page.explorers.has(made)).length;"
        " for (let i = 0; i < 100 && (i < 6 || left()); i++) { gc(); await new Promise(done => setTimeout(done, 60)); } return left();"
    )
    assert left == 0 and page.js("return page.explorers.size;") == 1
    assert page.contexts() == 1


def test_a_text_that_is_no_path_survives_and_is_said(page, graph, saved):
    saved("value")
    page.use(False)
    made = graph("worlds/value")
    node = next(node for node in made["nodes"] if node["type"] == "Lyra2Explorer")
    for text, says in (('{"path": 3}', 'no list "path"'), ("never a path", "JSON"), ('{"path": [{"R": [0,0,0,0], "T": [0,0,0], "fov": 40}]}', "R")):
        node["widgets_values"][1] = text
        page.load(made)
        page.standing()
        assert page.x("x.textWidget.value") == text
        assert says in page.x("x.panels.notice.textContent"), text
        assert page.js("return (await app.graphToPrompt()).output[x.id].inputs.path;") == text
    page.js(f"x.setKeys([{KEY}]);")
    assert page.x("JSON.parse(x.textWidget.value).path.length") == 2, "an edit replaces it"


def test_what_is_gone_is_said_with_a_way_out(page, graph, saved, server):
    keys = saved("gone", chunks=1)
    page.use(False)
    made = graph("worlds/gone")
    node = next(node for node in made["nodes"] if node["type"] == "Lyra2Explorer")
    missing = {"path": [], "lyra2": {"version": 1, "from": "0123456789abcdef", "frames": 17, "motion": "uniform motion", "captions": {}, "seed": 1}}
    node["widgets_values"][1] = json.dumps(missing)
    page.load(made)
    page.wait("x && !x.panels.message.hidden && x.panels.message.textContent.includes('gone')")
    page.button("Stand at the latest").click()
    page.standing()
    assert page.x("x.world.state") == keys[-1] and page.x("JSON.parse(x.textWidget.value).lyra2.from") == keys[-1]
    shutil.rmtree(server.output / "worlds" / "gone")
    page.js("await x.loadWorld();")
    page.wait("x.panels.message.textContent.includes('No world here yet')")
    assert page.x("JSON.parse(x.textWidget.value).lyra2.from") == keys[-1], "the text is kept"


def test_a_second_tab_sees_what_the_first_one_grew(page_module, browser, page, graph, server, saved):
    saved("shared")
    page.use(False)
    page.load(graph("worlds/shared"))
    page.standing()
    other = page_module.ExplorerPage(browser, server)
    try:
        other.use(False)
        other.load(graph("worlds/shared"))
        other.standing()
        page.js(f"x.setKeys([{KEY}]); await x.startGrowing();")
        page.wait("x.world.chain.length === 2 && !x.grow.busy")
        other.js("await x.comeBack();")
        other.wait("x.panels.notice.textContent.includes('grown in another place')")
        assert other.x("x.world.chain.length") == 1, "it stays where it stood"
        other.button("Stand at the latest").click()
        other.wait("x.world.chain.length === 2 && x.blockKeys.length === 2")
        assert other.x("x.world.state") == page.x("x.world.state")
    finally:
        other.tab.close()


def test_a_lost_socket_loses_nothing(page, graph, saved):
    saved("lost")
    page.use(False)
    page.load(graph("worlds/lost"))
    page.standing()
    # what the server says while the line is down reaches nobody
    page.js(f"x.setKeys([{KEY}]); await x.startGrowing(); x.api.socket.onmessage = null; x.api.socket.close();")
    page.wait("x.world.chain.length === 2 && !x.grow.busy && x.blockKeys.length === 2")
    assert len(page.chunks("lost")) == 2


def test_one_context_for_twenty_nodes_and_the_same_picture_after_it_was_lost(page, graph, saved):
    saved("value")
    page.use(False)
    page.load(graph("worlds/value", grows=False))
    page.standing()
    sharpness = """
        x.stage.lastDraw = x.picture(); const copy = x.stage.picture(), { data } = copy.getContext('2d').getImageData(0, 0, copy.width, copy.height);
        let sum = 0; for (let i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2]; return sum / data.length;"""
    page.wait("!x.stage.raf && !x.stage.drawing()")
    before = page.js(sharpness)
    assert before > 30
    page.js("window.loss = x.stage.gl.getExtension('WEBGL_lose_context'); window.loss.loseContext();")
    page.wait("x.stage.gl.isContextLost()")
    page.js("window.loss.restoreContext();")
    page.wait("!x.stage.gl.isContextLost()")
    page.js("x.stage.invalidate();")
    page.wait("!x.stage.raf && !x.stage.drawing()")
    after = page.js(sharpness)
    assert after == pytest.approx(before, rel=0.01), f"{before} before, {after} after"
    page.add_explorers(19)
    page.tab.wait_for_timeout(500)
    assert page.contexts() <= 1
    page.js("for (const node of app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').slice(1)) app.graph.remove(node);")


@pytest.mark.parametrize(
    "vue, other, times, more",
    [(False, "CLIPTextEncode", 50, lambda cost: cost + 4), (True, "Lyra2PreviewChunks", 12, lambda cost: 1.5 * cost)],
    ids=["classic", "nodes2"],
)
def test_explorers_that_came_and_went_are_gone(page, graph, saved, vue, other, times, more):
    saved("value")
    page.use(vue)
    page.load(graph("worlds/value", grows=False))
    page.standing()
    page.js("const n = app.graph._nodes.find(n => n.type === 'Lyra2Explorer'); app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [-400, 60];")
    page.cycle("Lyra2Explorer", 2)
    cost = {}
    for kind, cycles in ((other, max(12, times // 2)), ("Lyra2Explorer", times)):
        before = page.dom_nodes()
        alive = page.cycle(kind, cycles)
        cost[kind] = (page.dom_nodes() - before) / cycles
    print(f"\nDOM nodes a cycle, {'nodes 2.0' if vue else 'classic'}: {cost}; Explorers alive after GC that are not on the page: {alive}")
    assert alive == 0
    assert cost["Lyra2Explorer"] <= more(cost[other])
    page.use(False)
    assert page.contexts() <= 1
