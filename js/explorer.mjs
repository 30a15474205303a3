/**
 * One Explorer per node: the plan and its undo list, where one stands, the state of Grow, bound to the node's text and
 * properties. What is drawn is the Stage's and the overlay's, what is clicked the panels'.
 */

import { el, place } from "./dom.mjs";
import { Flight } from "./flight.mjs";
import { Grow, chunkSeconds } from "./grow.mjs";
import { executionId, targetsOf, widgetOf } from "./host.mjs";
import { Minimap, drawOverlay } from "./overlay.mjs";
import { furnish, openStage, page } from "./page.mjs";
import { Panels } from "./panels.mjs";
import { add, emptyPlan, halfHeight, turned } from "./path.mjs";
import { Planning } from "./planning.mjs";
import { listen } from "./pointer.mjs";
import { Standing } from "./standing.mjs";
import { Watching } from "./watching.mjs";
import { Latest } from "./worlds.mjs";

const KEPT_PATHS = 20, SAVE_AFTER = 500;
const PREVIEW_SHARE = 0.36, PREVIEW_MOST = 300;
const SETTINGS = {
    preview: true, map: true, cameras: true, tint: false, splats: false, pointSize: 1, budget: 500_000, millimetres: false, speed: 1, chunks: 0, view: null, grown: [],
};

export const shared = page;
/** The id that the server knows a node by. */
export const idOf = executionId;

/** @returns {Explorer} */
export function open({ app, api, node, root, handed, texts, sheet }) {
    furnish(api, texts, sheet);
    const explorer = new Explorer({ app, api, node, root, handed });
    explorer.begin();
    return explorer;
}

export class Explorer extends Watching(Standing(Planning(Object))) {
    constructor({ app, api, node, root, handed }) {
        super();
        Object.assign(this, { app, api, node, root, handed, t: page.t });
        this.control = new AbortController();
        this.plan = emptyPlan();
        this.history = { plans: [this.plan], at: 0 };
        this.selected = -1;
        this.flight = new Flight();
        this.settings = { ...SETTINGS, ...node.properties?.lyra2 };
        this.flight.speed = this.settings.speed;
        Object.assign(this, {
            past: [], poses: [], depth: 1, scrub: 0, visible: true, sources: [-1e9, 1e9], space: "world", hits: [], panel: null, narrow: true,
            latest: new Latest(page.worlds), retrieval: new Latest(page.worlds), blockKeys: [], chunkFrames: 80, aspect: 16 / 9,
        });
        this.panels = new Panels(this);
        this.view = this.panels.view;
        this.minimap = new Minimap(this.panels.mapCanvas);
        root.replaceChildren(this.panels.body);
        listen(this, this.panels, this.control.signal);
        this.watchSize();
        this.grow = new Grow({
            api, app, signal: this.control.signal, folder: () => this.folder,
            onChange: () => this.growChanged(), onWorld: (entry, ours) => this.worldGrew(entry, ours),
        });
        this.api.addEventListener("executed", (event) => this.offeredPath(event.detail), { signal: this.control.signal });
        this.api.addEventListener("reconnected", () => this.comeBack(), { signal: this.control.signal });
        page.explorers.add(this);
    }

    // ------------------------------------------------------------------------------------------------ opening, closing

    async begin() {
        this.readText();
        if (this.handed?.folder === this.folder) this.restore(this.handed);
        this.handed = null;
        if (this.panel) this.panels.showPanel(this.panel);
        this.refresh();
        await this.loadWorld();
        if (!this.closed && this.standing) this.grow.resume(this.targets().map(({ id }) => id));
    }

    async getStage(version) {
        if (this.stage) return;
        try {
            const stage = await openStage(this.app, this.api, version);
            if (this.closed) return;
            this.stage = stage;
        } catch (error) {
            if (!this.closed) this.panels.setMessage(this.t("noLibrary"), error.message);
            return;
        }
        if (!this.stage.owner || !this.stage.owner.visible) this.takeStage();
        this.showBlocks();
    }

    get folder() {
        return widgetOf(this.node, "folder")?.value ?? "";
    }

    get id() {
        return executionId(this.app, this.node);
    }

    watchSize() {
        const { signal } = this.control;
        const size = new ResizeObserver(() => {
            this.narrow = this.view.clientWidth < 620;
            this.seenAs = null;
            this.redraw();
        });
        size.observe(this.view);
        const seen = new IntersectionObserver((entries) => {
            this.visible = entries.at(-1).isIntersecting;
            if (this.visible) this.appeared();
        });
        seen.observe(this.view);
        signal.addEventListener("abort", () => [size, seen].forEach((observer) => observer.disconnect()));
    }

    appeared() {
        if (!this.closed && this.textWidget?.value !== this.written) this.readText();
        if (this.stage && !this.stage.owner) this.takeStage();
        this.seenAs = null;
        this.redraw();
    }

    /** Into another element of the page. */
    moveTo(root) {
        if (this.closed || root === this.root) return;
        this.root = root;
        if (!this.overlay) root.replaceChildren(this.panels.body);
        this.redraw();
    }

    /** What the same node, made again by the host's undo, goes on with. */
    handOver() {
        const { folder, selected, history, panel, scrub } = this;
        return { folder, selected, history, panel, scrub, full: Boolean(this.overlay), pose: this.flight.pose, focused: this.hasFocus() };
    }

    restore({ selected, history, pose, full, focused, scrub, panel }) {
        this.panel = panel;
        this.takeHistory(history);
        this.selected = Math.min(selected, this.plan.keys.length - 1);
        this.flight.pose = pose;
        this.placed = true;
        this.scrub = scrub;
        if (full) this.toggleFull();
        if (focused) requestAnimationFrame(() => !this.closed && this.focusView());
    }

    /** Ends everything and lets go of everything; the host keeps removed nodes alive. */
    close() {
        const handed = this.handOver();
        this.closed = true;
        this.saveSettings(0);
        this.control.abort();
        [this.committing, this.asking, this.saving, this.fading].forEach(clearTimeout);
        this.latest.stop();
        this.retrieval.stop();
        this.stage?.takeBack(this);
        this.closeOverlay();
        this.panels.close();
        this.root.replaceChildren();
        page.explorers.delete(this);
        Object.assign(this, { node: null, root: null, panels: null, view: null, minimap: null, plan: null, history: null, grow: null, stage: null });
        Object.assign(this, { live: null, settled: null, poses: null, past: null, world: null, points: null, standing: null, used: null });
        return handed;
    }

    // ----------------------------------------------------------------------------------------------------------- stage

    takeStage() {
        if (!this.stage || this.closed || this.stage.owner === this) return;
        this.stage.lend(this);
        this.showBlocks();
    }

    onLent() {
        this.panels.still.hidden = true;
        this.showGizmo();
        this.redraw();
    }

    onTakenBack(picture) {
        if (!this.panels || !picture) return;
        const { still } = this.panels;
        Object.assign(still, { width: picture.width, height: picture.height });
        still.getContext("2d").drawImage(picture, 0, 0);
        still.hidden = false;
        this.flight.releaseAll();
        this.stopPlaying();
        this.redraw();
    }

    applySettings() {
        const { stage, settings } = this;
        if (!stage || stage.owner !== this) return;
        stage.limit = settings.budget;
        stage.shared.bigger.value = settings.pointSize;
        stage.shared.tint.value = settings.tint ? 1 : 0;
        stage.shared.sources.value.set(...this.sources);
        if (settings.splats !== Boolean(stage.wantsSplats)) {
            stage.setSplats(settings.splats).catch((error) => {
                this.set("splats", false);
                this.panels.setNotice(this.t("noSplats", { text: error.message }), { bad: true });
            });
        }
        stage.invalidate();
    }

    /** Draws what changed: the points again only if they are seen from elsewhere, since that is what costs. */
    redraw() {
        if (this.stage?.owner === this && (this.flight.moving || this.playing || this.recording || this.seenAs !== JSON.stringify(this.picture()))) this.stage.invalidate();
        else if (!this.drawing2d) this.drawing2d = requestAnimationFrame(() => {
            this.drawing2d = 0;
            if (!this.closed) this.drawOver();
        });
    }

    /** One frame of motion; true while more is to come. */
    onFrame(seconds, now) {
        const moving = this.flight.moving || Boolean(this.playing) || Boolean(this.recording);
        this.flight.step(seconds);
        if (this.recording) this.recording.push({ ...this.flight.pose });
        if (this.playing) this.playOn(now);
        if (this.wasMoving && !this.flight.moving) this.viewSettled();
        this.wasMoving = this.flight.moving;
        if (moving) this.fadePhoto();
        return moving || this.dragged-- > 0;
    }

    /** The canvas's vertical field of view, so that the picture of a key here fits into it whole. */
    shownFov() {
        const { clientWidth, clientHeight } = this.view, across = clientWidth / Math.max(clientHeight, 1);
        const room = Math.max(1, this.aspect / Math.max(across, 0.01)) * 1.08;
        return (360 / Math.PI) * Math.atan(room * halfHeight(this.flight.pose.fov));
    }

    picture() {
        const rect = this.previewRect(), seen = this.sidePose();
        const side = rect && !this.grow.picture ? { pose: seen, fov: seen.fov, aspect: this.aspect, rect } : null;
        return { pose: this.flight.pose, fov: this.shownFov(), near: this.depth * 2e-3, far: this.depth * 400, side };
    }

    sidePose() {
        return this.poses[Math.min(this.scrub, this.poses.length - 1)] ?? this.standing ?? this.flight.pose;
    }

    /** Left, top, width, height of the side preview in the view's pixels; null if there is none. */
    previewRect() {
        if (!this.settings.preview || !this.standing || (this.poses.length < 2 && !this.grow.picture)) return null;
        const { clientWidth, clientHeight } = this.view;
        const right = this.panel && !this.overlay ? this.panels.panel.offsetWidth : 0, room = clientWidth - right;
        const width = Math.round(Math.min(PREVIEW_MOST, PREVIEW_SHARE * room, (clientHeight * 0.34) * this.aspect)), height = Math.round(width / this.aspect);
        place(this.panels.previewBox, { right: 8 + right });
        return width > 60 ? [room - width - 9, clientHeight - height - 9, width, height] : null;
    }

    onDrawn() {
        this.seenAs = JSON.stringify(this.stage.lastDraw);
        this.drawOver();
        if (this.panel === "view") this.panels.panelFields?.();
    }

    drawOver() {
        const { panels } = this, shown = {
            pose: this.flight.pose, fov: this.shownFov(), aspect: this.aspect, depth: this.depth, past: this.past, poses: this.poses, marks: this.live?.marks ?? [],
            keys: this.plan.keys, standing: this.standing, selected: this.selected, hovered: this.hovered, frozen: this.grow.busy ? this.grow.path : null,
            scrub: this.poses.length > 1 && (this.playing || this.scrub > 0) ? this.sidePose() : null, pivot: this.flight.pivot, guide: this.standing ? this.aspect : null,
            chunkFrames: this.chunkFrames, cameras: this.settings.cameras, side: this.previewRect(),
        };
        this.hits = drawOverlay(panels.drawn, shown).keys;
        panels.drawStrip();
        const map = this.settings.map && this.standing && this.blockKeys.length;
        panels.mapBox.hidden = !map;
        if (map) {
            const side = Math.round(Math.max(92, Math.min(190, 0.27 * this.view.clientWidth, 0.36 * this.view.clientHeight)));
            place(panels.mapBox, { width: side, height: side });
            this.minimap.draw(this.shownBlocks(), shown);
        }
        panels.updateChips();
        this.placePhoto();
        if (this.panel === "key" && this.selected < 0) panels.panelFields?.();
    }

    /** Brings every text, button and picture up to date. */
    refresh() {
        if (this.closed) return;
        this.panels.update();
        this.redraw();
    }

    // -------------------------------------------------------------------------------------------------------- commands

    run(command) {
        if (this.closed || (command.can && !command.can(this))) return;
        command.run(this);
        this.refresh();
    }

    focusView() {
        this.panels?.sink.focus({ preventScroll: true });
    }

    hasFocus() {
        return this.panels.body.contains(document.activeElement);
    }

    hold(code) {
        if (!this.standing) return;
        this.takeStage();
        this.stopPlaying();
        this.flight.hold(code);
        this.redraw();
    }

    letGo() {
        if (this.closed) return;
        this.flight.releaseAll();
        this.redraw();
    }

    /** The page is seen again, or the server is back: what was made meanwhile? */
    async comeBack() {
        if (this.closed) return;
        this.grow.look();
        if (!this.world) return this.loadWorld();
        if (!(await this.lookAround())) return;
        this.noticeGrown();
        this.refresh();
    }

    /** Learns which states the folder has by now; false if it can't. */
    async lookAround() {
        const newest = await page.worlds.world(this.folder).catch(() => null);
        if (this.closed || !newest || !this.world) return false;
        this.world = { ...this.world, tree: newest.tree, latest: newest.latest };
        return true;
    }

    /** Whether a state of the folder was grown from the one where this stands. */
    comesFromHere(state) {
        const parents = new Map(this.world.tree.map((entry) => [entry.state, entry.parent]));
        while (state && state !== this.world.state) state = parents.get(state);
        return Boolean(state);
    }

    noticeGrown() {
        const { latest, state } = this.world;
        if (latest === state || this.grow.busy || !this.comesFromHere(latest)) return;
        this.panels.setNotice(this.t("grewElsewhere"), { actions: [this.panels.action("standLatest", () => this.standAt(latest))] });
    }

    goHome() {
        this.flight.to(this.standing);
    }

    goToPhoto() {
        this.flight.to(this.past[0] ?? this.standing);
    }

    toggleOrbit() {
        const { flight } = this;
        if (flight.pivot) flight.pivot = null;
        else this.orbitAt([this.view.clientWidth / 2, this.view.clientHeight / 2]);
    }

    /** Circles the known point under a place of the view, or what is as far away as the scene. */
    orbitAt([px, py]) {
        if (!this.standing || !this.stage) return;
        const { clientWidth, clientHeight } = this.view, { pose } = this.flight;
        const x = (2 * px) / clientWidth - 1, y = (2 * py) / clientHeight - 1;
        const found = this.stage.owner === this && this.stage.pick(pose, this.shownFov(), clientWidth / clientHeight, x, y);
        this.flight.pivot = found || add(pose.T, turned(pose.R, [0, 0, 1]), this.depth);
        this.redraw();
    }

    changeSpeed(by) {
        this.flight.faster(by);
        this.settings.speed = this.flight.speed;
        this.saveSettings();
        this.redraw();
    }

    viewMoved() {
        this.dragged = 2;
        this.fadePhoto();
        this.stopPlaying("along");
        this.redraw();
    }

    viewSettled() {
        if (this.closed || !this.placed) return;
        this.settings.view = { R: this.flight.pose.R, T: this.flight.pose.T, fov: this.flight.pose.fov };
        this.saveSettings();
        this.redraw();
    }

    // ------------------------------------------------------------------------------------------------------------ grow

    targets() {
        return this.id ? targetsOf(this.app, this.id, this.node) : [];
    }

    nodeName(type) {
        return window.LiteGraph?.registered_node_types?.[type]?.title ?? type ?? "";
    }

    /** What decides how long a chunk takes. */
    conditions() {
        const kinds = this.targets().map(({ node }) => [node.comfyClass, widgetOf(node, "quality")?.value ?? ""].join("/"));
        return [this.folder, this.world?.size.join("x"), this.chunkFrames, ...kinds].join("|");
    }

    chunkSeconds() {
        return chunkSeconds(this.conditions());
    }

    beginWorld() {
        this.focusView();
        return this.grow.begin({ targets: [this.id], kind: "begin", chunks: 1 });
    }

    async startGrowing() {
        if (this.committing) this.commit();
        const targets = this.targets();
        if (!targets.length) return this.panels.setNotice(this.t("noTargets"), { bad: true });
        if (!this.plan.keys.length) return this.panels.setNotice(this.t("noKeys"));
        if (this.plan.frames !== this.framesWanted() || this.written !== this.textWidget.value || this.plan.from !== this.world.state) this.commit({ ...this.plan, from: this.world.state });
        this.touched = false;
        this.used = { path: this.written, from: this.world.state, seed: this.plan.seed };
        this.stopPlaying();
        await this.grow.begin({ targets: targets.map(({ id }) => id), kind: "grow", chunks: this.chunks, path: this.poses, conditions: this.conditions() });
    }

    growChanged() {
        if (this.closed || !this.grow) return;
        const { grow } = this;
        // the side preview shows the pose that is being painted
        if (grow.state === "running" && grow.kind === "grow" && !this.touched && grow.progress.steps > 1 && this.poses.length > 1) {
            const { chunk, share = 0, whole, chunks } = grow.progress;
            this.scrub = Math.round((whole ? share : (chunk + (grow.progress.stage === "append" ? share : 0)) / chunks) * (this.poses.length - 1));
        }
        if (!this.refreshing) this.refreshing = requestAnimationFrame(() => {
            this.refreshing = 0;
            this.refresh();
        });
    }

    /** A state of this folder was made, by us or by somebody else. */
    async worldGrew(entry, ours) {
        if (!this.world) return this.loadWorld(this.plan.from);
        if (entry.state === this.world.state) return;
        const mine = ours && this.grow.kind === "grow";
        if (mine && entry.parent === this.world.state) return this.goOnFrom(entry);
        if (!(await this.lookAround())) return;
        // a chunk between may have been said to nobody
        if (mine && this.comesFromHere(entry.state)) return this.goOnFrom(entry);
        if (!ours) this.noticeGrown();
        this.refresh();
    }

    /** The new chunk: it stands at its end now, the camera stays where it is. */
    async goOnFrom(entry) {
        const { used } = this;
        if (used) {
            this.settings.grown = [...this.settings.grown, { ...used, state: entry.state }].slice(-KEPT_PATHS);
            this.saveSettings(0);
        }
        const keys = this.touched ? this.plan.keys : [];
        this.plan = { ...this.plan, from: entry.state, keys, before: null };
        this.selected = keys.length ? this.selected : -1;
        this.world = { ...this.world, state: entry.state };
        await this.loadWorld(entry.state);
        if (this.closed) return;
        this.settings.chunks = 0;
        const touched = this.touched;
        this.commit();
        this.touched = touched;
        this.scrub = 0;
        this.refresh();
    }

    // --------------------------------------------------------------------------------------------- panels and settings

    togglePanel(name) {
        this.panel = this.panel === name ? null : name;
        this.panels.showPanel(this.panel);
        if (this.panel === "path") this.askMemory();
    }

    async askMemory() {
        const stats = await (await this.api.fetchApi("/system_stats")).json().catch(() => null);
        const device = stats?.devices?.find(({ type }) => type !== "cpu");
        if (this.closed || !device) return;
        this.freeMemory = device.vram_free;
        this.refresh();
    }

    toggle(name) {
        this.set(name, !this.settings[name]);
    }

    set(name, value) {
        this.settings[name] = value;
        this.saveSettings();
        this.applySettings();
        this.refresh();
    }

    setSources(first, last) {
        this.sources = [Math.min(first, last), Math.max(first, last)];
        this.applySettings();
        this.refresh();
    }

    /** Into the workflow, but not into the prompt: nothing of this changes a result. */
    saveSettings(after = SAVE_AFTER) {
        const save = () => {
            if (!this.node) return;
            const changed = Object.entries(this.settings).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(SETTINGS[name]));
            this.node.properties = { ...this.node.properties, lyra2: Object.fromEntries(changed) };
        };
        clearTimeout(this.saving);
        if (after) this.saving = setTimeout(save, after);
        else save();
    }

    toggleHelp() {
        this.helpShown = !this.helpShown;
        this.panels.showHelp(this.helpShown);
    }

    toggleFull() {
        if (this.overlay) this.closeOverlay();
        else {
            this.overlay = el("div.lyra2-overlay");
            this.root.replaceChildren(el("div.lyra2-away", { textContent: this.t("away") }));
            this.overlay.append(this.panels.body);
            document.body.append(this.overlay);
        }
        this.takeStage();
        this.focusView();
        this.redraw();
    }

    closeOverlay() {
        if (!this.overlay) return;
        this.root?.replaceChildren(this.panels.body);
        this.overlay.remove();
        this.overlay = null;
    }

    /** One step out: help, recording, playing, handles, the choice, the panel, full screen. */
    escape() {
        if (this.helpShown) this.toggleHelp();
        else if (this.recording) this.recording = null;
        else if (this.playing) this.stopPlaying();
        else if (this.gizmo) this.setGizmo(this.gizmo);
        else if (this.selected >= 0) this.select(-1);
        else if (this.panel) this.togglePanel(this.panel);
        else if (this.overlay) this.toggleFull();
        else if (this.flight.pivot) this.flight.pivot = null;
    }
}
