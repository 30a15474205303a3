/** What the widget needs of ComfyUI's page: where a node is, what runs after it, queueing, and the graph's own undo. */

/** Ids of the subgraph nodes around the node's graph, outermost first. */
function pathTo(root, graph, path = []) {
    if (root === graph) return path;
    for (const node of root._nodes ?? []) {
        if (!node.isSubgraphNode?.()) continue;
        const found = pathTo(node.subgraph, graph, [...path, node.id]);
        if (found) return found;
    }
    return null;
}

/** The id that the server knows the node by, such as "12" or, inside a subgraph, "8:12"; null for one that is in no graph. */
export function executionId(app, node) {
    const path = node.graph && pathTo(app.rootGraph ?? app.graph, node.graph);
    return path ? [...path, node.id].join(":") : null;
}

/** The node, and the graphs around it, from its execution id. */
function placeOf(app, id) {
    const path = id.split(":");
    let graph = app.rootGraph ?? app.graph;
    const around = [];
    for (const part of path.slice(0, -1)) {
        const holder = graph.getNodeById(Number(part)) ?? graph.getNodeById(part);
        around.push({ graph, holder });
        graph = holder.subgraph;
    }
    return { graph, around, prefix: path.slice(0, -1) };
}

const linkOf = (graph, id) => graph.links?.get?.(id) ?? graph.links?.[id] ?? graph._links?.get(id);
const nodeOf = (graph, id) => graph.getNodeById(id);

/**
 * The nearest output nodes downstream of the node, breadth first, as {id, node}; nothing behind them.
 * Follows links into subgraphs and out of them.
 */
export function targetsOf(app, id, node) {
    const found = new Map(), seen = new Set();
    const queue = [{ ...placeOf(app, id), node }];
    while (queue.length) {
        const place = queue.shift();
        (place.node.outputs ?? []).forEach((_, slot) => {
            for (const next of followed(place, slot)) {
                const key = [...next.prefix, next.node.id].join(":");
                if (seen.has(key)) continue;
                seen.add(key);
                if (next.node.constructor?.nodeData?.output_node) found.set(key, next.node);
                else queue.push(next);
            }
        });
    }
    return [...found].map(([key, target]) => ({ id: key, node: target }));
}

/** The nodes at the other ends of an output's links. */
function followed({ graph, around, prefix, node }, slot) {
    return (node.outputs[slot]?.links ?? []).flatMap((id) => {
        const link = linkOf(graph, id);
        return link ? endsOf({ graph, around, prefix }, link) : [];
    });
}

function endsOf({ graph, around, prefix }, link) {
    const target = nodeOf(graph, link.target_id);
    if (target?.isSubgraphNode?.()) {
        const inner = { graph: target.subgraph, around: [...around, { graph, holder: target }], prefix: [...prefix, target.id] };
        const ids = target.subgraph.inputs?.[link.target_slot]?.linkIds ?? [];
        return ids.flatMap((id) => {
            const next = linkOf(target.subgraph, id);
            return next ? endsOf(inner, next) : [];
        });
    }
    if (target) return [{ graph, around, prefix, node: target }];
    if (!around.length) return [];
    // a link to the subgraph's own output goes on outside it
    const outer = around.at(-1);
    return followed({ graph: outer.graph, around: around.slice(0, -1), prefix: prefix.slice(0, -1), node: outer.holder }, link.target_slot);
}

/** A widget of the node, or undefined. */
export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Tells the host that the graph changed by a finished gesture, so that its own undo and "unsaved" mark know. */
export function recordChange(app) {
    app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.();
    app.graph?.setDirtyCanvas?.(true, false);
}

/** Whether a prompt, as the server lists it, is to run exactly these targets. */
const hasTargets = (entry, targets) => [...(entry[4] ?? [])].map(String).sort().join() === [...targets].sort().join();

/** The server's queue: {entry, running, before} of each prompt, the running ones first. */
async function queued(api) {
    const { queue_running, queue_pending } = await (await api.fetchApi("/queue")).json();
    const pending = [...queue_pending].sort((a, b) => a[0] - b[0]);
    return [...queue_running, ...pending].map((entry, i) => ({
        entry, running: i < queue_running.length, before: i < queue_running.length ? 0 : i,
    }));
}

/** The newest of these prompts that is over and had these targets: {id, finished}; null if there is none. */
export async function finishedPromptOf(api, targets, ids) {
    if (!ids.length) return null;
    const history = await (await api.fetchApi("/history?max_items=16")).json();
    const found = ids.filter((id) => history[id] && hasTargets(history[id].prompt, targets));
    return found.length ? { id: found.at(-1), finished: true } : null;
}

/** The newest prompt in the queue whose targets are these: {id, running, before}; null if there is none. */
export async function promptOf(api, targets) {
    const found = (await queued(api)).filter(({ entry }) => hasTargets(entry, targets)).sort((a, b) => a.entry[0] - b.entry[0]).at(-1);
    return found ? { ...found, id: found.entry[1] } : null;
}

export async function promptEntry(api, id) {
    return (await queued(api)).find(({ entry }) => entry[1] === id) ?? null;
}

export async function stopPrompt(api, id, running) {
    if (running) return api.interrupt(id);
    return api.fetchApi("/queue", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ delete: [id] }) });
}

/** Wheel as the host has it: ours if the view has the focus, else the canvas zooms. */
export function givesWheelToCanvas(app, event, sink) {
    if (document.activeElement === sink && !event.ctrlKey) return false;
    app.canvas?.processMouseWheel?.(event);
    return true;
}
