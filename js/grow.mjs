/**
 * Grow: from asking to the new chunk. Holds what is known of our prompt; the Explorer shows it.
 *
 * States: idle, asking, waiting, running, done, failed. Acts on folder and state of what arrives, never on node ids alone,
 * since another open workflow may have the same ids.
 */

import { finishedPromptOf, promptEntry, promptOf, stopPrompt } from "./host.mjs";

const STAGES = ["retrieve", "pack", "sample", "append"];
const ENDS = { execution_success: "done", execution_error: "failed", execution_interrupted: "idle" };
const DONE_FOR = 10_000;

export class Grow {
    /** @param {{api: object, app: object, onChange: () => void, onWorld: (entry: object) => void, signal: AbortSignal, remember: Storage}} options */
    constructor({ api, app, onChange, onWorld, folder, signal }) {
        Object.assign(this, { api, app, onChange, onWorld, folder });
        this.over = new Set();          // prompts of ours that ended; a lagging page still hears of them
        this.reset();
        const on = (name, act) => api.addEventListener(name, (event) => act(event.detail ?? {}), { signal });
        const { started, progressed, pictured, executed } = this;
        for (const [name, act] of Object.entries({ execution_start: started, progress_state: progressed, b_preview_with_metadata: pictured, executed })) {
            on(name, (detail) => this.heard(detail.prompt_id ?? detail.jobId, () => act.call(this, detail)));
        }
        for (const [name, state] of Object.entries(ENDS)) on(name, (detail) => this.heard(detail.prompt_id, () => this.ended(detail, state)));
        on("status", () => this.look());
        on("reconnected", () => this.look());
        signal.addEventListener("abort", () => this.close());
    }

    reset() {
        clearTimeout(this.ending);
        this.dropPicture();
        Object.assign(this, {
            state: "idle", prompt: null, held: [], targets: [], problem: null, kind: "grow", path: null,
            progress: { chunk: 0, chunks: 1, stage: "", step: 0, steps: 0, before: 0, since: 0, arrivals: [] },
        });
    }

    dropPicture() {
        if (this.picture) URL.revokeObjectURL(this.picture);
        this.picture = null;
    }

    set(state, values = {}) {
        Object.assign(this, values, { state });
        this.onChange();
    }

    get busy() {
        return ["asking", "waiting", "running"].includes(this.state);
    }

    /** Queues the targets. `kind`: "grow" or "begin"; `path`: the poses that are made, drawn apart while it runs. */
    async begin({ targets, kind, chunks, path, conditions }) {
        this.reset();
        this.set("asking", { targets, kind, path, conditions, progress: { ...this.progress, chunks } });
        const queued = await this.app.queuePrompt(0, 1, { queueNodeIds: targets });
        if (this.state !== "asking") return;
        if (queued === false) return this.set("failed", { problem: { text: "rejected" } });
        this.set("waiting");
        await this.look();
    }

    /** What happened to a prompt; until ours is known, which it is not at once, it is kept. */
    heard(prompt, act) {
        if (!this.busy || this.prompt || !prompt) return act();
        if (this.over.has(prompt)) return;
        this.held.push({ prompt, act });
        if (this.state !== "asking" && !this.looking) this.looking = this.look().finally(() => (this.looking = null));
    }

    /** The prompt is known: whatever was kept happens now. */
    identify(prompt) {
        this.prompt = prompt;
        const { held } = this;
        this.held = [];
        held.forEach(({ act }) => act());
    }

    /** Asks the queue where our prompt is: after queueing, after a lost socket, when the page is back. */
    async look() {
        if (!this.targets.length || !this.busy) return;
        let found;
        try {
            found = this.prompt ? await promptEntry(this.api, this.prompt) : await promptOf(this.api, this.targets)
                ?? await finishedPromptOf(this.api, this.targets, this.held.map(({ prompt }) => prompt));
        } catch {
            return;     // no server just now; "reconnected" asks again
        }
        if (!this.busy) return;
        if (!found) return this.fromHistory();
        if (!this.prompt) this.identify(found.id);
        if (!this.busy || found.finished) return;
        this.queuedAt(found);
    }

    queuedAt({ running, before }, values = {}) {
        this.set(running ? "running" : "waiting", { ...values, progress: { ...this.progress, before, since: this.progress.since || performance.now() } });
    }

    /** Our prompt is in the queue no more: how did it end? */
    async fromHistory() {
        if (!this.prompt) return;
        const history = await (await this.api.fetchApi(`/history/${this.prompt}`)).json();
        const status = history[this.prompt]?.status;
        if (!this.busy) return;
        for (const output of Object.values(history[this.prompt]?.outputs ?? {})) this.announce(output, true);
        const messages = Object.fromEntries(status?.messages ?? []);
        if (messages.execution_error) return this.ended({ prompt_id: this.prompt, ...messages.execution_error }, "failed");
        this.ended({ prompt_id: this.prompt }, status?.status_str === "success" ? "done" : "idle");
    }

    /** A prompt of ours that runs already, as after a reload. */
    async resume(targets) {
        if (this.busy) return;
        const found = await promptOf(this.api, targets).catch(() => null);
        if (!found || this.busy) return;
        this.reset();
        this.queuedAt(found, { targets, prompt: found.id });
    }

    ours(detail) {
        return this.busy && detail.prompt_id && detail.prompt_id === this.prompt;
    }

    started(detail) {
        if (!this.ours(detail)) return;
        this.set("running", { progress: { ...this.progress, before: 0, since: performance.now() } });
    }

    progressed({ prompt_id, nodes }) {
        if (!this.ours({ prompt_id })) return;
        const running = Object.entries(nodes ?? {}).filter(([, node]) => node.state === "running");
        const deepest = running.sort(([a], [b]) => b.length - a.length)[0];
        if (!deepest) return;
        const [id, node] = deepest;
        const chunk = /\.chunk(\d+)/.exec(id), stage = STAGES.findLast((name) => id.includes(`.${name}`)) ?? "";
        const { progress } = this;
        const chunks = progress.chunks;
        this.set("running", { progress: {
            ...progress, stage, step: node.value, steps: node.max,
            chunk: chunk ? Number(chunk[1]) : stage ? progress.chunk : Math.min(chunks - 1, Math.floor((node.value / Math.max(node.max, 1)) * chunks)),
            share: node.max > 1 ? node.value / node.max : 0, whole: !chunk,
        } });
    }

    pictured({ blob, jobId }) {
        if (!blob || !this.busy || jobId !== this.prompt) return;
        this.dropPicture();
        this.set(this.state, { picture: URL.createObjectURL(blob) });
    }

    executed(detail) {
        this.announce(detail.output, this.ours(detail));
    }

    announce(output, ours = false) {
        for (const entry of output?.lyra2_world ?? []) {
            if (entry.folder !== this.folder()) continue;
            if (ours) this.arrived(entry);
            this.onWorld(entry, ours);
        }
    }

    arrived(entry) {
        const { progress } = this, now = performance.now();
        if (progress.arrivals.some(({ state }) => state === entry.state)) return;
        this.progress = { ...progress, arrivals: [...progress.arrivals, { state: entry.state, at: now }] };
        if (this.kind !== "grow" || !entry.parent) return;
        const earlier = progress.arrivals.filter(({ grown }) => grown).at(-1)?.at ?? progress.since;
        this.progress.arrivals.at(-1).grown = true;
        if (earlier) remember(this.conditions, (now - earlier) / 1000);
    }

    ended(detail, state) {
        if (!this.ours(detail)) return;
        this.over.add(this.prompt);
        const grown = this.kind === "grow" && this.progress.arrivals.some(({ grown: made }) => made);
        const problem = state === "failed" ? { node: detail.node_type, text: detail.exception_message ?? "" } : null;
        this.dropPicture();
        this.set(state === "done" && !grown ? "idle" : state, { problem, prompt: null, path: null });
        if (this.state === "done") this.ending = setTimeout(() => this.state === "done" && this.set("idle"), DONE_FOR);
    }

    async stop() {
        if (!this.prompt) await this.look();
        if (this.prompt && this.busy) {
            const running = this.state === "running";
            await stopPrompt(this.api, this.prompt, running);
            // the event may be far behind: a page that lags is told everything in order
            clearInterval(this.watch);
            this.watch = setInterval(() => (this.busy ? this.look() : clearInterval(this.watch)), 1000);
            if (!running) this.set("idle", { prompt: null, path: null });
        }
    }

    /** Seconds until the end, or null before anything is known. */
    secondsLeft() {
        const { since, chunk, chunks, share = 0, whole } = this.progress;
        const passed = (performance.now() - since) / 1000, done = whole ? share * chunks : chunk + share;
        if (!since || done < 0.05 * chunks || passed < 1) return null;
        return (passed / done) * (chunks - done);
    }

    dismiss() {
        if (this.state === "done" || this.state === "failed") this.set("idle", { problem: null });
    }

    close() {
        clearTimeout(this.ending);
        clearInterval(this.watch);
        this.dropPicture();
        Object.assign(this, { path: null, onChange: () => {}, onWorld: () => {}, folder: () => null, state: "idle" });
    }
}

const TIMES = "lyra2.chunkSeconds";

/** Keeps how long a chunk took under these conditions, in this browser. */
function remember(conditions, seconds) {
    try {
        const all = JSON.parse(localStorage.getItem(TIMES) ?? "{}");
        all[conditions] = [...(all[conditions] ?? []), Math.round(seconds * 10) / 10].slice(-9);
        localStorage.setItem(TIMES, JSON.stringify(all));
    } catch { /* a browser without storage knows no times */ }
}

/** The median seconds of a chunk under these conditions, or null. */
export function chunkSeconds(conditions) {
    try {
        const times = [...(JSON.parse(localStorage.getItem(TIMES) ?? "{}")[conditions] ?? [])].sort((a, b) => a - b);
        return times.length ? times[times.length >> 1] : null;
    } catch {
        return null;
    }
}
