/** Lyra 2's part of ComfyUI's page: a view in every Lyra 2 Explorer, loaded when one is first seen. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "Lyra2Explorer";
const HEIGHT = () => 420;
const SIZE = [560, 640];

/** What runs for each node on the page. The host keeps removed nodes alive, so nothing hangs on the nodes themselves. */
const opened = new Map();
/** Of nodes that were just removed, by execution id: the host's undo makes the same node again at once. */
const handed = new Map();

let explorers = null;       // the module, once it is loaded
let loading = null;
/** All of js/ as one module, in the language that the page had first: two of them would each have a stage. */
export const load = () => (loading ??= (async () => {
    const language = String(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? navigator.language ?? "en").slice(0, 2).toLowerCase();
    return (explorers = await import(api.fileURL(`/lyra2/page/${language}.mjs`)));
})().catch((error) => {
    loading = null;
    throw error;
}));

function widgetOf(node, name) {
    return node.widgets?.find((widget) => widget.name === name);
}

/** The text stays the node's value; the view is what one sees of it, in both frontends. */
function hideText(node) {
    const widget = widgetOf(node, "path");
    if (!widget) return;
    widget.hidden = true;
    widget.options.hidden = true;       // the same object: Nodes 2.0 watches it
    if (widget.element) widget.element.style.display = "none";
}

/** Only an element: this also runs for nodes that are never added to a graph and never removed. */
function addView(node) {
    const root = document.createElement("div");
    root.className = "lyra2-root";
    // last, so that widgets without a saved value do not shift the values of others
    const widget = node.addDOMWidget("explorer", "LYRA2_EXPLORER", root, { serialize: false, hideOnZoom: false, getMinHeight: HEIGHT });
    widget.serialize = false;
    node.setSize?.(SIZE.map((least, side) => Math.max(least, node.size[side])));
}

function follow(node) {
    const { onAdded, onRemoved, onConfigure } = node;
    node.onAdded = function (...given) {
        onAdded?.apply(this, given);
        start(this);
    };
    node.onRemoved = function (...given) {
        stop(this);
        onRemoved?.apply(this, given);
    };
    node.onConfigure = function (...given) {
        onConfigure?.apply(this, given);
        opened.get(this)?.explorer?.appeared();
    };
}

/** Whether the node is still reached from the page's graph; the nodes of a dropped subgraph are never told that they went. */
function isThere(node) {
    const root = app.rootGraph ?? app.graph, { graph } = node;
    const known = graph === root || root.subgraphs?.get(graph?.id) === graph;
    return known && graph.getNodeById(node.id) === node;
}

function sweep() {
    for (const node of [...opened.keys()]) if (!isThere(node)) stop(node);
}

/** Waits until the view is seen. */
function start(node) {
    if (opened.has(node)) return;
    const root = widgetOf(node, "explorer").element, entry = { explorer: null, id: null, root: null };
    opened.set(node, entry);
    const seen = new IntersectionObserver((entries) => {
        const found = entries.find(({ isIntersecting }) => isIntersecting)?.target;
        if (!found || entry.root === found) return;
        const first = !entry.root;
        entry.root = found;
        if (found === root) seen.disconnect();
        if (first) show(node, entry);
        else entry.explorer?.moveTo(found);
    });
    entry.stop = () => seen.disconnect();
    seen.observe(root);
    // Nodes 2.0 goes on showing the element of a node that was made again with the same id
    const former = explorers && handed.get(explorers.idOf(app, node))?.root;
    if (former) seen.observe(former);
}

async function show(node, entry) {
    try {
        const { open, idOf, texts, sheet } = await load();
        if (opened.get(node) !== entry) return;
        entry.id = idOf(app, node);
        entry.explorer = open({ app, api, node, root: entry.root, handed: handed.get(entry.id)?.state, texts, sheet });
        handed.delete(entry.id);
    } catch (error) {
        console.error(error);
        entry.root.textContent = `Lyra 2: ${error.message}`;
        const widget = widgetOf(node, "path");
        if (widget?.element) widget.element.style.display = "";
        if (widget) widget.hidden = widget.options.hidden = false;
    }
}

function stop(node) {
    const entry = opened.get(node);
    if (!entry) return;
    opened.delete(node);
    entry.stop();
    if (!entry.explorer) return;
    handed.set(entry.id, { state: entry.explorer.close(), root: entry.root });
    entry.explorer = null;
    // made again within a moment, or gone for good
    setTimeout(() => handed.delete(entry.id), 1500);
}

app.registerExtension({
    name: "Lyra2.Explorer",
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return;
        hideText(node);
        addView(node);
        follow(node);
    },
    afterConfigureGraph: sweep,
});
