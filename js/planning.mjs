/** The plan of an Explorer: its text, its undo list, its keys, and what can be said of it at once. */

import { el } from "./dom.mjs";
import { recordChange, widgetOf } from "./host.mjs";
import { page } from "./page.mjs";
import * as maths from "./path.mjs";

const UNDO_STEPS = 200, COMMIT_AFTER = 500, ASK_AFTER = 250;
const CELLS_PER_CHUNK = 10, MOST_CELLS = 60, DRAGGED_CELLS = 20, LIVE_POINTS = 50_000;

/** @param {typeof Object} Base */
export const Planning = (Base) => class extends Base {
    // --------------------------------------------------------------------------------------------------- text and plan

    get textWidget() {
        return this.node && widgetOf(this.node, "path");
    }

    /** The plan from the node's text, which is never overwritten by reading. */
    readText() {
        const text = this.textWidget?.value ?? "";
        this.written = text;
        try {
            this.plan = maths.parsePlan(text);
            this.textProblem = null;
        } catch (error) {
            if (!(error instanceof maths.PathTextError)) throw error;
            this.plan = maths.emptyPlan();
            this.textProblem = error.message;
        }
        this.panels.setNotice(this.textProblem && this.t("unreadable", { text: this.textProblem }), { bad: true });
        this.history = { plans: [this.plan], at: 0 };
        this.selected = Math.min(this.selected, this.plan.keys.length - 1);
        this.planChanged();
        if (this.world && this.plan.from !== this.openedAs) this.loadWorld();
    }

    /** A plan while a gesture lasts: shown, not yet written. */
    preview(plan) {
        this.plan = plan;
        this.planChanged(true);
    }

    /** A finished change: into the undo list, the node's text and the host's undo. */
    commit(plan = this.plan, { selected = this.selected } = {}) {
        clearTimeout(this.committing);
        this.committing = null;
        plan = { ...plan, keys: plan.keys.slice(0, maths.MAX_KEYS - 1) };
        if (plan.keys.length) plan = { ...plan, from: plan.from || this.world?.state || "", before: this.neighbour() };
        this.plan = plan;
        this.plan = { ...plan, frames: this.framesWanted() };
        this.selected = Math.min(selected, plan.keys.length - 1);
        const { history } = this;
        history.plans = [...history.plans.slice(0, history.at + 1), this.plan].slice(-UNDO_STEPS);
        history.at = history.plans.length - 1;
        this.touched = true;
        this.write();
        this.planChanged();
    }

    commitSoon(after = COMMIT_AFTER) {
        clearTimeout(this.committing);
        if (this.edited().index < 0) return this.viewSettled();
        this.committing = setTimeout(() => this.commit(), after);
    }

    write() {
        if (!this.textWidget) return;
        this.textProblem = null;
        this.written = maths.formatPlan(this.plan, this.standing ?? this.flight.pose);
        this.textWidget.value = this.written;
        recordChange(this.app);
    }

    /** Goes on with the undo list of the same node; if the host's own undo brought another text, that is one more step. */
    takeHistory({ plans, at }) {
        const same = JSON.stringify(plans[at]) === JSON.stringify(this.plan);
        const taken = same ? plans : [...plans.slice(0, at + 1), this.plan].slice(-UNDO_STEPS);
        this.history = { plans: taken, at: same ? at : taken.length - 1 };
    }

    undo(by) {
        if (this.committing) this.commit();
        const { history } = this, at = Math.max(0, Math.min(history.plans.length - 1, history.at + by));
        if (at === history.at) return;
        history.at = at;
        const moved = history.plans[at].from !== this.plan.from;
        this.plan = history.plans[at];
        this.selected = Math.min(this.selected, this.plan.keys.length - 1);
        this.write();
        this.planChanged();
        if (moved) this.loadWorld();
    }

    /** Everything that follows from the plan; cheap enough for every step of a drag. */
    planChanged(dragging = false) {
        if (this.standing) {
            this.aim();
            this.poses = maths.framesOf(this.plan, this.standing, this.framesWanted());
            this.scrub = Math.min(this.scrub, this.poses.length - 1);
            this.measure(dragging);
        } else this.poses = [];
        if (!dragging) {
            this.settled = null;
            this.askServer();
        }
        this.showGizmo();
        this.refresh();
    }

    /** How long the chunks of whatever grows this world are. */
    aim() {
        const found = this.targets().map(({ node }) => widgetOf(node, "chunk_frames")?.value).find(Number.isFinite);
        this.chunkFrames = found ?? 80;
    }

    get chunks() {
        return Math.max(1, Math.round((this.framesWanted() - 1) / this.chunkFrames));
    }

    /** Frames of whole chunks: as many as were asked for, or as the way is worth. */
    framesWanted() {
        const asked = this.settings.chunks;
        if (asked) return 1 + this.chunkFrames * asked;
        if (!this.plan.keys.length || !this.standing) return 1 + this.chunkFrames;
        return 1 + this.chunkFrames * maths.chunksNeeded(maths.framesOf(this.plan, this.standing, 81), this.depth);
    }

    changeChunks(by) {
        this.settings.chunks = Math.max(1, Math.min(100, this.chunks + by));
        this.saveSettings();
        if (this.plan.keys.length) this.commit();
        else this.refresh();
    }

    // ---------------------------------------------------------------------------------------------------- live numbers

    lens() {
        return { size: this.world.size, ratio: this.ratio, centre: this.centre };
    }

    /** Known points of the first two levels, all blocks together; again only when other blocks are shown. */
    livePoints() {
        if (this.pointsOf === this.blockKeys.join()) return this.points;
        const blocks = this.shownBlocks(), total = blocks.reduce((sum, block) => sum + block.coarse, 0);
        const share = Math.min(1, LIVE_POINTS / Math.max(total, 1));
        const parts = blocks.map((block) => block.positions.subarray(0, 4 * Math.floor(block.coarse * share)));
        this.points = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
        let at = 0;
        for (const part of parts) {
            this.points.set(part, at);
            at += part.length;
        }
        this.pointsOf = this.blockKeys.join();
        return this.points;
    }

    shownBlocks() {
        return this.blockKeys.map((state) => page.worlds.cached(this.folder, state) ?? this.stage?.blocks.get(`${this.folder} ${state}`)?.block).filter(Boolean);
    }

    /** Coverage, clearance and effort of the plan. */
    measure(dragging = false) {
        this.live = null;
        if (this.poses.length < 2 || !this.world) return;
        const began = performance.now(), points = this.livePoints(), count = points.length / 4, last = this.poses.length - 1;
        if (!count) return;
        const grid = maths.gridOf(this.world.size, Math.max(...this.shownBlocks().map((block) => block.coarseStride)));
        const cells = Math.min(dragging ? DRAGGED_CELLS : MOST_CELLS, CELLS_PER_CHUNK * this.chunks);
        const frames = Array.from({ length: cells }, (_, i) => Math.round(((i + 1) / cells) * last));
        const covered = frames.map((frame) => maths.coverage(this.poses[frame], this.lens(), points, count, grid));
        const centres = Math.min(20 * this.chunks, dragging ? 40 : 200);
        const nearest = Math.min(...Array.from({ length: centres + 1 }, (_, i) => maths.clearance(this.poses[Math.round((i / centres) * last)].T, points, count)));
        const effort = Math.max(...maths.effort(this.poses, this.chunkFrames, this.depth));
        this.setLive(frames, covered, nearest, effort, performance.now() - began);
    }

    setLive(frames, covered, nearest, effort, took) {
        const { MARKS } = maths, least = Math.min(...covered);
        this.live = {
            frames, covered, least, nearest, effort, took, marks: covered.map(MARKS.coverage),
            coverageMark: MARKS.coverage(least), clearanceMark: MARKS.clearance(nearest, this.depth), effortMark: MARKS.effort(effort),
        };
    }

    coverageAt(frame) {
        if (!this.live || this.poses.length < 2) return null;
        const at = this.live.frames.findIndex((shown) => shown >= frame);
        return this.live.covered[at < 0 ? this.live.covered.length - 1 : at];
    }

    risky() {
        return this.live && [this.live.coverageMark, this.live.clearanceMark, this.live.effortMark].includes("poor");
    }

    /** The server's finer numbers, once the last change is a moment ago; retrieval after them, since it is slow. */
    askServer() {
        clearTimeout(this.asking);
        if (!this.standing || !this.plan.keys.length || this.textProblem) return;
        const plan = this.plan;
        this.asking = setTimeout(async () => {
            const path = maths.formatPlan({ ...plan, frames: this.framesWanted() }, this.standing);
            const body = { folder: this.folder, state: this.world.state, path, chunk_frames: this.chunkFrames, client: `${this.api.clientId ?? ""} ${this.id}` };
            try {
                const found = await this.latest.preflight({ ...body, retrieve: false });
                if (!found || this.closed || plan !== this.plan) return;
                this.settled = found;
                this.setLive(found.views.map((v) => v.frame), found.views.map((v) => v.coverage), found.nearest.distance ?? Infinity, Math.max(...found.effort), found.ms);
                this.refresh();
                const more = await this.retrieval.preflight({ ...body, retrieve: true });
                if (!more || this.closed || plan !== this.plan) return;
                this.settled = { ...found, retrieved: more.retrieved };
                this.refresh();
            } catch (error) {
                if (!this.closed) this.panels.setNotice(error.message, { bad: true });
            }
        }, ASK_AFTER);
    }

    // ------------------------------------------------------------------------------------------------------------ keys

    viewKey() {
        const { R, T, fov } = this.flight.pose;
        return { R: R.slice(), T: T.slice(), fov };
    }

    addKey() {
        const at = this.selected >= 0 ? this.selected + 1 : this.plan.keys.length;
        if (this.plan.keys.length >= maths.MAX_KEYS - 1) return this.panels.setNotice(this.t("enoughKeys", { n: maths.MAX_KEYS }));
        const last = at === this.plan.keys.length, keys = this.plan.keys.toSpliced(at, 0, this.viewKey());
        // appending goes on appending; inserting goes on behind the one just inserted
        this.commit({ ...this.plan, keys }, { selected: last ? -1 : at });
        this.scrub = this.poses.length - 1;
    }

    setKeys(keys, selected = this.selected) {
        this.commit({ ...this.plan, keys }, { selected });
    }

    /** The plan with a key changed. */
    withKey(index, change) {
        return { ...this.plan, keys: this.plan.keys.with(index, { ...this.plan.keys[index], ...change }) };
    }

    setKeyToView() {
        this.commit(this.withKey(this.selected, this.viewKey()));
    }

    duplicateKey() {
        this.setKeys(this.plan.keys.toSpliced(this.selected + 1, 0, { ...this.plan.keys[this.selected] }), this.selected + 1);
    }

    removeKey() {
        this.setKeys(this.plan.keys.toSpliced(this.selected, 1), this.selected - 1);
    }

    select(index) {
        if (this.committing) this.commit();
        this.selected = index ?? -1;
        if (this.selected < 0) this.gizmo = null;
        else this.scrub = this.keyFrames()[this.selected] ?? this.scrub;
        this.showGizmo();
        this.refresh();
    }

    selectNext(by) {
        const count = this.plan.keys.length;
        this.select(this.selected < 0 ? (by > 0 ? 0 : count - 1) : (this.selected + by + count) % count);
    }

    hover(index) {
        if (index === this.hovered) return;
        this.hovered = index;
        this.panels.sink.classList.toggle("over-key", index >= 0);
        this.redraw();
    }

    keyAt([x, y]) {
        const near = this.hits.map((hit) => ({ ...hit, off: Math.hypot(hit.x - x, hit.y - y) })).filter(({ off }) => off < 12);
        return near.sort((a, b) => a.off - b.off)[0]?.index ?? -1;
    }

    /** The pose that the number fields show: of the chosen key, else of the view. */
    edited() {
        const key = this.plan.keys[this.selected];
        return key ? { pose: key, index: this.selected } : { pose: this.flight.pose, index: -1 };
    }

    editPose(change) {
        const { pose, index } = this.edited();
        if (index < 0) {
            this.flight.to(change(pose), { glide: false });
            this.redraw();
        } else this.preview(this.withKey(index, change(pose)));
    }

    fovToAll() {
        const { fov } = this.edited().pose;
        this.setKeys(this.plan.keys.map((key) => ({ ...key, fov })));
    }

    setGizmo(mode) {
        this.gizmo = this.gizmo === mode ? null : mode;
        this.showGizmo();
    }

    setSpace(space) {
        this.space = space;
        this.showGizmo();
        this.refresh();
    }

    toggleSpace() {
        this.setSpace(this.space === "local" ? "world" : "local");
    }

    showGizmo() {
        const { stage, plan, selected } = this, key = plan.keys[selected];
        this.gizmoShown = Boolean(stage && stage.owner === this && this.gizmo && key);
        if (!stage || stage.owner !== this) return;
        if (!this.gizmoShown) return stage.detachGizmo();
        const handlers = {
            onChange: ({ R, T }) => this.preview(this.withKey(this.selected, { R: maths.unit(R), T })),
            onDragging: (dragging) => {
                this.gizmoDragging = dragging;
                if (!dragging) this.commit();
            },
        };
        stage.attachGizmo(this.panels.sink, key, this.gizmo, this.space, handlers);
    }

    /** Frame of each key on the planned path: where it comes nearest to the key, in order. */
    keyFrames() {
        const last = this.poses.length - 1, { keys } = this.plan;
        let from = 0;
        return keys.map((key, k) => {
            let best = Infinity, where = from;
            const until = k === keys.length - 1 ? last : last - (keys.length - 1 - k);
            for (let i = from; i <= until; i++) {
                const off = maths.distance(this.poses[i].T, key.T) / this.depth + maths.angle(this.poses[i].R, key.R) / 60;
                if (off < best - 1e-6) [best, where] = [off, i];
            }
            if (k === keys.length - 1) where = last;
            from = where;
            return where;
        });
    }

    // -------------------------------------------------------------------------------------------------- the whole path

    useStart(name) {
        this.setKeys(maths.STARTS[name](this.standing, this.depth), -1);
    }

    transformPath(change) {
        this.setKeys(maths.transformed(this.plan.keys, this.standing.T, change));
    }

    reversePath() {
        this.setKeys(maths.reversed(this.plan.keys, this.standing), -1);
    }

    thereAndBack() {
        this.setKeys(maths.thereAndBack(this.plan.keys, this.standing));
    }

    clearPath() {
        this.setKeys([], -1);
    }

    /** The plan as a file: the camera path itself, or one of the formats that the pack writes. */
    async saveFile(format) {
        const name = this.folder.split("/").at(-1) || "path", path = maths.formatPlan(this.plan, this.standing);
        const own = { name: `${name}.json`, blob: new Blob([path], { type: "application/json" }) };
        await this.said(async () => {
            const file = format ? await page.worlds.cameraFile({ folder: this.folder, state: this.world.state, path, format }) : own;
            const link = el("a", { href: URL.createObjectURL(file.blob), download: file.name });
            link.click();
            setTimeout(() => URL.revokeObjectURL(link.href), 1000);
        });
    }

    loadFile() {
        const input = el("input", { type: "file", accept: ".json,.npz,application/json" });
        input.addEventListener("change", () => this.said(async () => {
            const file = input.files[0], text = file.name.endsWith(".json") ? await file.text() : "";
            const query = { folder: this.folder, state: this.world.state, name: file.name };
            // a camera path is read here, as it is; everything else becomes one on the server
            this.takePath(/"path"\s*:/.test(text) ? text : await page.worlds.pathFrom("cameras", file, query));
        }));
        input.click();
    }

    async usePreset(preset, direction, strength) {
        const asked = { folder: this.folder, state: this.world.state, preset, direction, strength, frames: 1 + this.chunkFrames * this.chunks };
        await this.said(async () => this.takePath(await page.worlds.pathFrom("preset", asked)));
    }

    presets() {
        return (page.presets ??= page.worlds.presets());
    }

    /** Runs what may be refused, and says why it was. */
    async said(act) {
        try {
            await act();
        } catch (error) {
            if (!this.closed) this.panels.setNotice(error.message, { bad: true });
        }
    }

    /** A camera path from elsewhere becomes the plan, from where it stands; what it says of states does not count. */
    takePath(text) {
        try {
            const { keys, curve, order, loop, motion, captions } = maths.parsePlan(text);
            const plan = { ...this.plan, keys, curve, order, loop, motion };
            this.commit(Object.keys(captions).length ? { ...plan, captions } : plan, { selected: -1 });
        } catch (error) {
            if (!(error instanceof maths.PathTextError)) throw error;
            this.panels.setNotice(this.t("unreadable", { text: error.message }), { bad: true });
        }
    }

    /** Cameras that are connected to the node are offered as a path to edit. */
    offeredPath({ display_node, node, output } = {}) {
        const text = output?.lyra2_path?.[0];
        if (!text || this.plan.keys.length || ![display_node, node].includes(this.id)) return;
        this.offered = text;
        this.takeOffered();
    }

    /** It begins where the world stands, which is not known before the world is open. */
    takeOffered() {
        const text = this.standing && this.offered;
        if (!text) return;
        this.offered = null;
        this.takePath(text);
    }
};
