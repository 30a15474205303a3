/**
 * One Explorer per node: the plan and its undo list, where one stands, the state of Grow, bound to the node's text and
 * properties. What is drawn is the Stage's and the overlay's, what is clicked the panels'.
 */

const own = (name) => import(new URL(name + new URL(import.meta.url).search, import.meta.url).href);
const [maths, worldsModule, stageModule, drawing, flightModule, growModule, host, panelsModule, pointer, dom, icons, commands, style] = await Promise.all(
    ["path", "worlds", "stage", "overlay", "flight", "grow", "host", "panels", "pointer", "dom", "icons", "commands", "style"].map((name) => own(`./${name}.mjs`)));

const UNDO_STEPS = 200, KEPT_PATHS = 20, FPS = 16, COMMIT_AFTER = 500, ASK_AFTER = 250;
const CELLS_PER_CHUNK = 10, MOST_CELLS = 60, DRAGGED_CELLS = 20, LIVE_POINTS = 50_000;
const PREVIEW_SHARE = 0.36, PREVIEW_MOST = 300;
const SETTINGS = {
    preview: true, map: true, cameras: true, tint: false, splats: false, pointSize: 1, budget: 500_000, millimetres: false, speed: 1, chunks: 0, view: null, grown: [],
};

/** What all Explorers of the page share: the client of worlds, and the stage once one is seen. */
const page = { worlds: null, stage: null, texts: null, explorers: new Set() };
export const shared = page;

/** @returns {Promise<Explorer>} */
export async function open({ app, api, node, root, handed }) {
    style.addStyle();
    page.worlds ??= new worldsModule.Worlds(api, maths.quaternion);
    page.texts ??= loadTexts(app);
    const explorer = new Explorer({ app, api, node, root, t: await page.texts, handed });
    explorer.ready = explorer.begin();
    return explorer;
}

/** A function from a text's id and values to the text in the page's language, English where that has none. */
async function loadTexts(app) {
    const locale = String(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? navigator.language ?? "en").slice(0, 2).toLowerCase();
    const load = async (name) => (await fetch(new URL(`./texts/${name}.json${new URL(import.meta.url).search}`, import.meta.url))).json();
    const [texts, english] = await Promise.all([["zh", "ja"].includes(locale) ? load(locale) : {}, load("en")]);
    return (id, values = {}) => (texts[id] ?? english[id] ?? id).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** The stage of the page, made with the libraries of the host's own frontend (of this version) when it is first needed. */
function openStage(api, version) {
    page.stage ??= (async () => {
        if (!version) throw new Error((await (await page.worlds.fetch("/lyra2/lib")).json()).missing);
        const library = (name) => import(api.fileURL(`/lyra2/lib/${version}/${name}`));
        return new stageModule.Stage(await library("three.module.js"), library);
    })().catch((error) => {
        page.stage = null;
        throw error;
    });
    return page.stage;
}

export class Explorer {
    constructor({ app, api, node, root, t, handed }) {
        Object.assign(this, { app, api, node, root, t, maths, drawing });
        this.control = new AbortController();
        this.plan = maths.emptyPlan();
        this.history = { plans: [this.plan], at: 0 };
        this.selected = -1;
        this.flight = new flightModule.Flight(maths);
        this.settings = { ...SETTINGS, ...node.properties?.lyra2 };
        this.flight.speed = this.settings.speed;
        Object.assign(this, {
            past: [], poses: [], depth: 1, scrub: 0, visible: true, sources: [-1e9, 1e9], space: "world", hits: [], handed, panel: handed?.panel ?? null, narrow: true,
            latest: new worldsModule.Latest(page.worlds), retrieval: new worldsModule.Latest(page.worlds), blockKeys: [], chunkFrames: 80, aspect: 16 / 9,
        });
        this.panels = new panelsModule.Panels(this, { dom, icons, commands });
        this.view = this.panels.view;
        this.minimap = new drawing.Minimap(this.panels.mapCanvas);
        root.replaceChildren(this.panels.body);
        pointer.listen(this, this.panels, { dom, commands, flightModule, host }, this.control.signal);
        this.watchSize();
        this.grow = new growModule.Grow({
            api, app, host, signal: this.control.signal, folder: () => this.folder,
            onChange: () => this.growChanged(), onWorld: (entry, ours) => this.worldGrew(entry, ours),
        });
        this.api.addEventListener("executed", (event) => this.offeredPath(event.detail), { signal: this.control.signal });
        this.api.addEventListener("reconnected", () => this.comeBack(), { signal: this.control.signal });
        page.explorers.add(this);
    }

    // ----------------------------------------------------------------------------------------------- opening, closing

    async begin() {
        this.readText();
        if (this.handed) this.restore(this.handed);
        if (this.panel) this.panels.showPanel(this.panel);
        this.refresh();
        await this.loadWorld();
        if (!this.closed && this.standing) this.grow.resume(this.targets().map(({ id }) => id));
    }

    async getStage(version) {
        if (this.stage) return;
        try {
            const stage = await openStage(this.api, version);
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
        return host.widgetOf(this.node, "folder")?.value ?? "";
    }

    get id() {
        return host.executionId(this.app, this.node);
    }

    watchSize() {
        const { signal } = this.control;
        const size = new ResizeObserver(() => {
            this.narrow = this.view.clientWidth < 620;
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
        this.redraw();
    }

    /** What the same node, made again by the host's undo, goes on with. */
    handOver() {
        return { selected: this.selected, history: this.history, full: Boolean(this.overlay), panel: this.panel, pose: this.flight.pose, focused: this.hasFocus(), scrub: this.scrub };
    }

    restore({ selected, history, pose, full, focused, scrub }) {
        // the host's own undo brought another text: then that is one more step of ours
        const same = JSON.stringify(history.plans[history.at]) === JSON.stringify(this.plan);
        this.history = same ? history : { plans: [...history.plans.slice(0, history.at + 1), this.plan].slice(-UNDO_STEPS), at: Math.min(history.at + 1, UNDO_STEPS - 1) };
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
        for (const name of ["node", "root", "panels", "view", "minimap", "plan", "history", "live", "settled", "poses", "past", "world", "grow", "stage", "handed", "textWidgetOf"]) this[name] = null;
        return handed;
    }

    // ------------------------------------------------------------------------------------------------ text and plan

    get textWidget() {
        return this.node && host.widgetOf(this.node, "path");
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
        this.edited = true;
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
        host.recordChange(this.app);
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
        const found = this.targets().map(({ node }) => host.widgetOf(node, "chunk_frames")?.value).find(Number.isFinite);
        this.chunkFrames = found ?? 80;
    }

    get chunks() {
        return Math.max(1, Math.round((this.framesWanted() - 1) / this.chunkFrames));
    }

    /** Frames of whole chunks: as many as were asked for, or as the way is worth. */
    framesWanted() {
        if (!this.plan.keys.length || !this.standing) return this.plan.frames;
        const asked = this.settings.chunks;
        if (asked) return 1 + this.chunkFrames * asked;
        return 1 + this.chunkFrames * maths.chunksNeeded(maths.framesOf(this.plan, this.standing, 81), this.depth);
    }

    changeChunks(by) {
        this.settings.chunks = Math.max(1, Math.min(100, this.chunks + by));
        this.saveSettings();
        if (this.plan.keys.length) this.commit();
        else this.refresh();
    }

    // --------------------------------------------------------------------------------------------------- live numbers

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

    // ------------------------------------------------------------------------------------------------------- worlds

    /** The summary of where the plan begins, then the points of its chunks, the newest first. */
    async loadWorld(state = this.plan.from) {
        const asked = (this.loading = Symbol("world"));
        this.openedAs = this.plan.from;
        let world;
        try {
            world = await page.worlds.world(this.folder, state);
            if (!state && world.chain.length > 1) world = await page.worlds.world(this.folder, world.chain[0]);
        } catch (error) {
            if (asked === this.loading && !this.closed) this.noWorld(error, state);
            return;
        }
        if (asked !== this.loading || this.closed) return;
        this.world = world;
        this.depth = this.flight.depth = world.depth || 1;
        this.aspect = world.size[1] / world.size[0];
        await Promise.all([this.getStage(world.library), this.loadBlocks(asked)]);
    }

    async noWorld(error, state) {
        Object.assign(this, { world: null, standing: null, poses: [], past: [], blockKeys: [], live: null });
        if (this.stage?.owner === this) this.stage.show([]);
        if (error.status === 404 && state && !(await page.worlds.world(this.folder).catch(() => null))) state = "";
        if (this.closed || this.world) return;
        const begin = this.panels.action("begin", () => this.beginWorld(), { classes: "primary", icon: icons.icon("begin") });
        if (error.status === 404 && state) {
            const latest = this.panels.action("standLatest", () => this.standAtLatest());
            this.panels.setMessage(this.t("stateGone"), error.message, [latest, begin]);
        } else if (error.status === 404) this.panels.setMessage(this.t("empty"), this.t("emptyHint", { folder: this.folder }), [begin]);
        else this.panels.setMessage(this.t("noWorld"), error.message, [this.panels.action("again", () => this.loadWorld())]);
        this.refresh();
    }

    async loadBlocks(asked) {
        const { world, folder } = this, wanted = [...world.chain].reverse();
        this.blockKeys = world.chain.filter((state) => page.worlds.cached(folder, state));
        try {
            const newest = await page.worlds.block(folder, wanted[0]);
            if (asked !== this.loading || this.closed) return;
            this.standAtEndOf(newest);
            this.blockArrived(wanted[0]);
            await Promise.all([0, 1].map(async (lane) => {
                for (let i = 1 + lane; i < wanted.length; i += 2) {
                    await page.worlds.block(folder, wanted[i]);
                    if (asked !== this.loading || this.closed) return;
                    this.blockArrived(wanted[i]);
                }
            }));
            if (asked !== this.loading || this.closed) return;
            this.past = world.chain.flatMap((state) => page.worlds.cached(folder, state)?.cameras ?? []);
            this.planChanged();
        } catch (error) {
            if (asked === this.loading && !this.closed) this.panels.setNotice(error.message, { bad: true, actions: [this.panels.action("again", () => this.loadWorld())] });
        }
    }

    standAtEndOf(block) {
        this.standing = block.cameras.at(-1);
        const view = block.views.at(-1), [height, width] = this.world.size;
        this.ratio = view ? view.fx / view.fy : 1;
        this.centre = view ? [view.cx, view.cy] : [(width - 1) / 2, (height - 1) / 2];
        if (!this.placed) this.flight.to(this.settings.view ?? this.standing, { glide: false });
        this.placed = true;
        this.panels.setMessage(null);
    }

    blockArrived(state) {
        this.blockKeys = this.world.chain.filter((known) => known === state || this.blockKeys.includes(known));
        this.past = this.world.chain.flatMap((known) => page.worlds.cached(this.folder, known)?.cameras ?? []);
        this.showBlocks();
        this.planChanged();
    }

    /** Puts the blocks of this chain on the stage, if it is lent to this Explorer. */
    showBlocks() {
        const { stage, folder } = this;
        if (!stage || stage.owner !== this || !this.world) return;
        for (const state of this.blockKeys) {
            const block = page.worlds.cached(folder, state);
            if (block) stage.addBlock(`${folder} ${state}`, block);
        }
        stage.show(this.blockKeys.map((state) => `${folder} ${state}`));
        const used = [...page.explorers].flatMap((other) => other.world?.tree.map(({ state }) => `${other.folder} ${state}`) ?? []);
        stage.keepOnly(used);
        this.applySettings();
    }

    /** A pose 8 frames before the standing one, or null at the photo. */
    neighbour() {
        return this.past.length > 8 ? this.past[this.past.length - 9] : null;
    }

    // --------------------------------------------------------------------------------------------------------- stage

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

    redraw() {
        if (this.stage?.owner === this) this.stage.invalidate();
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
        return (2 * Math.atan(room * Math.tan((this.flight.pose.fov * Math.PI) / 360)) * 180) / Math.PI;
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
        this.panels.previewBox.style.right = `${8 + right}px`;
        return width > 60 ? [room - width - 9, clientHeight - height - 9, width, height] : null;
    }

    onDrawn() {
        this.drawOver();
        if (this.panel === "view") this.panels.panelFields?.();
    }

    drawOver() {
        const { panels } = this, shown = {
            pose: this.flight.pose, fov: this.shownFov(), aspect: this.aspect, depth: this.depth, past: this.past, poses: this.poses, marks: this.live?.marks ?? [],
            keys: this.plan.keys, standing: this.standing, selected: this.selected, hovered: this.hovered, frozen: this.grow.busy ? this.grow.path : null,
            scrub: this.poses.length > 1 && (this.playing || this.scrub > 0) ? this.sidePose() : null, pivot: this.flight.pivot, guide: this.standing ? this.aspect : null,
            chunkFrames: this.chunkFrames, cameras: this.settings.cameras,
        };
        this.hits = drawing.drawOverlay(panels.drawn, maths, shown).keys;
        panels.drawStrip();
        const map = this.settings.map && this.standing && this.blockKeys.length;
        panels.mapBox.hidden = !map;
        if (map) {
            const side = Math.round(Math.max(92, Math.min(190, 0.27 * this.view.clientWidth, 0.36 * this.view.clientHeight)));
            Object.assign(panels.mapBox.style, { width: `${side}px`, height: `${side}px` });
            this.minimap.draw(maths, this.shownBlocks().map((block) => ({ block })), shown);
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

    // ------------------------------------------------------------------------------------------------------ commands

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
        const newest = await page.worlds.world(this.folder).catch(() => null);
        if (this.closed || !newest || !this.world) return;
        this.world = { ...this.world, tree: newest.tree, latest: newest.latest };
        this.noticeGrown();
        this.refresh();
    }

    noticeGrown() {
        const { latest, state, tree } = this.world;
        const parents = new Map(tree.map((entry) => [entry.state, entry.parent]));
        let from = latest;
        while (from && from !== state) from = parents.get(from);
        if (latest === state || !from || this.grow.busy) return;
        this.panels.setNotice(this.t("grewElsewhere"), { actions: [this.panels.action("standLatest", () => this.standAt(latest))] });
    }

    goHome() {
        this.flight.to(this.standing);
        this.redraw();
    }

    goToPhoto() {
        this.flight.to(this.past[0] ?? this.standing);
        this.redraw();
    }

    toggleOrbit() {
        const { flight } = this;
        if (flight.pivot) flight.pivot = null;
        else this.orbitAt([this.view.clientWidth / 2, this.view.clientHeight / 2]);
        this.redraw();
    }

    /** Circles the known point under a place of the view, or what is as far away as the scene. */
    orbitAt([px, py]) {
        if (!this.standing || !this.stage) return;
        const { clientWidth, clientHeight } = this.view, { pose } = this.flight;
        const x = (2 * px) / clientWidth - 1, y = (2 * py) / clientHeight - 1;
        const found = this.stage.owner === this && this.stage.pick(pose, this.shownFov(), clientWidth / clientHeight, x, y, maths.turned, maths.inverse);
        this.flight.pivot = found || maths.add(pose.T, maths.turned(pose.R, [0, 0, 1]), this.depth);
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

    // ---------------------------------------------------------------------------------------------------------- keys

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
        this.refresh();
    }

    setKeys(keys, selected = this.selected) {
        this.commit({ ...this.plan, keys }, { selected });
    }

    setKeyToView() {
        this.setKeys(this.plan.keys.with(this.selected, { ...this.plan.keys[this.selected], ...this.viewKey() }));
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
        } else this.preview({ ...this.plan, keys: this.plan.keys.with(index, change(pose)) });
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
            onChange: ({ R, T }) => this.preview({ ...this.plan, keys: this.plan.keys.with(this.selected, { ...this.plan.keys[this.selected], R: maths.unit(R), T }) }),
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

    // ------------------------------------------------------------------------------------------------ the whole path

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
            const link = dom.el("a", { href: URL.createObjectURL(file.blob), download: file.name });
            link.click();
            setTimeout(() => URL.revokeObjectURL(link.href), 1000);
        });
    }

    loadFile() {
        const input = dom.el("input", { type: "file", accept: ".json,.npz,application/json" });
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
        this.takePath(text);
    }

    // ----------------------------------------------------------------------------------------------- recording, playing

    toggleRecording() {
        if (!this.recording) this.recording = [];
        else {
            const poses = this.recording;
            this.recording = null;
            const off = poses.length && (maths.distance(poses[0].T, this.standing.T) > 0.01 * this.depth || maths.angle(poses[0].R, this.standing.R) > 1);
            const keys = maths.simplified(poses, this.depth).slice(off || this.plan.keys.length ? 0 : 1);
            if (keys.length) this.setKeys([...this.plan.keys, ...keys], -1);
        }
        this.refresh();
    }

    togglePlay(along) {
        const wanted = along ? "along" : "side";
        if (this.playing === wanted) return this.stopPlaying();
        if (this.scrub >= this.poses.length - 1) this.scrub = 0;
        this.playing = wanted;
        this.playFrom = { frame: this.scrub, at: performance.now() };
        this.flight.pivot = null;
        this.takeStage();
        this.redraw();
    }

    playOn(now) {
        const frame = this.playFrom.frame + Math.floor(((now - this.playFrom.at) / 1000) * FPS), last = this.poses.length - 1;
        this.scrub = Math.max(0, Math.min(frame, last));
        if (this.playing === "along") this.flight.pose = { ...this.poses[this.scrub] };
        if (frame >= last) this.stopPlaying();
        this.panels.update();
    }

    stopPlaying(only = null) {
        if (!this.playing || (only && this.playing !== only)) return;
        this.playing = null;
        this.refresh();
    }

    scrubTo(frame) {
        this.playing = null;
        this.scrub = Math.max(0, Math.min(this.poses.length - 1, frame));
        this.refresh();
    }

    scrubBy(frames) {
        this.scrubTo(this.scrub + frames);
    }

    // ---------------------------------------------------------------------------------------------------------- map

    mapKeyAt([u, v]) {
        const { clientWidth, clientHeight } = this.panels.mapCanvas;
        return this.plan.keys.findIndex((key) => {
            const [a, b] = this.minimap.toMap(key.T, clientWidth, clientHeight);
            return Math.hypot(a - u, b - v) < 8;
        });
    }

    goOnMap([u, v]) {
        const [x, z] = this.minimap.fromMap(u, v), { pose } = this.flight;
        this.flight.to({ ...pose, T: [x, pose.T[1], z] }, { glide: false });
        this.viewMoved();
    }

    dragOnMap(index, [u, v]) {
        const [x, z] = this.minimap.fromMap(u, v), key = this.plan.keys[index];
        this.preview({ ...this.plan, keys: this.plan.keys.with(index, { ...key, T: [x, key.T[1], z] }) });
    }

    // ------------------------------------------------------------------------------------------------------- history

    /** Stands at a state of the folder; the keys belonged to another place and go. */
    standAt(state, { keys = [], seed = this.plan.seed } = {}) {
        if (this.committing) this.commit();
        this.commit({ ...this.plan, from: state, keys, seed, before: null }, { selected: -1 });
        this.panels.setNotice(null);
        return this.loadWorld(state);
    }

    async standAtLatest() {
        const { latest } = await page.worlds.world(this.folder);
        return this.standAt(latest);
    }

    canStepBack() {
        return Boolean(this.world && this.world.chain.length > 1 && !this.grow.busy);
    }

    stepBack() {
        this.grow.dismiss();
        return this.standAt(this.world.chain.at(-2));
    }

    canReroll() {
        return Boolean(this.world && this.grownPath() && !this.grow.busy);
    }

    grownPath() {
        return this.settings.grown.findLast(({ state }) => state === this.world?.state);
    }

    /** The same way again from where it began, with the next seed. */
    async reroll() {
        const made = this.grownPath();
        const { keys, curve, order, loop, motion, captions, frames } = maths.parsePlan(made.path);
        this.settings.chunks = Math.max(1, Math.round((frames - 1) / this.chunkFrames));
        this.commit({ ...this.plan, from: made.from, keys, curve, order, loop, motion, captions, seed: made.seed + 1 }, { selected: -1 });
        await this.loadWorld(made.from);
        // the neighbour is of the new place
        this.commit();
        return this.startGrowing();
    }

    /** At a frame that was made: its camera, its picture fading over the points. */
    snapTo(frame) {
        const pose = this.past[frame];
        if (!pose) return;
        this.flight.to(pose, { glide: false });
        this.fadePhoto();
        const { photo } = this.panels;
        photo.src = page.worlds.frameUrl(this.folder, this.world.state, frame, 832);
        photo.hidden = false;
        photo.style.opacity = 1;
        this.photoShown = true;
        this.viewSettled();
        this.placePhoto();
    }

    placePhoto() {
        if (!this.photoShown) return;
        const { clientWidth, clientHeight } = this.view, share = Math.tan((this.flight.pose.fov * Math.PI) / 360) / Math.tan((this.shownFov() * Math.PI) / 360);
        const height = clientHeight * share, width = height * this.aspect;
        Object.assign(this.panels.photo.style, { width: `${width}px`, height: `${height}px`, left: `${(clientWidth - width) / 2}px`, top: `${(clientHeight - height) / 2}px` });
    }

    fadePhoto() {
        if (!this.photoShown) return;
        this.photoShown = false;
        const { photo } = this.panels;
        photo.style.opacity = 0;
        clearTimeout(this.fading);
        this.fading = setTimeout(() => !this.photoShown && (photo.hidden = true), 900);
    }

    /** The last frame of a state, small. */
    thumbnail({ state }) {
        const entries = new Map(this.world.tree.map((entry) => [entry.state, entry]));
        let frames = 0;
        for (let at = entries.get(state); at; at = entries.get(at.parent)) frames += at.frames;
        return page.worlds.frameUrl(this.folder, state, Math.max(0, frames - 1), 128);
    }

    // ---------------------------------------------------------------------------------------------------------- grow

    targets() {
        return this.id ? host.targetsOf(this.app, this.id, this.node) : [];
    }

    nodeName(type) {
        return window.LiteGraph?.registered_node_types?.[type]?.title ?? type ?? "";
    }

    /** What decides how long a chunk takes. */
    conditions() {
        const kinds = this.targets().map(({ node }) => [node.comfyClass, host.widgetOf(node, "quality")?.value ?? ""].join("/"));
        return [this.folder, this.world?.size.join("x"), this.chunkFrames, ...kinds].join("|");
    }

    chunkSeconds() {
        return growModule.chunkSeconds(this.conditions());
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
        this.edited = false;
        this.used = { path: this.written, from: this.world.state, seed: this.plan.seed };
        this.stopPlaying();
        await this.grow.begin({ targets: targets.map(({ id }) => id), kind: "grow", chunks: this.chunks, path: this.poses, conditions: this.conditions() });
    }

    growChanged() {
        if (this.closed || !this.grow) return;
        const { grow } = this;
        // the side preview shows the pose that is being painted
        if (grow.state === "running" && grow.kind === "grow" && !this.edited && grow.progress.steps > 1 && this.poses.length > 1) {
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
        if (ours && this.grow.kind === "grow" && entry.parent === this.world.state) return this.goOnFrom(entry);
        const newest = await page.worlds.world(this.folder).catch(() => null);
        if (this.closed || !newest || !this.world) return;
        this.world = { ...this.world, tree: newest.tree, latest: newest.latest };
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
        const keys = this.edited ? this.plan.keys : [];
        this.plan = { ...this.plan, from: entry.state, keys, before: null };
        this.selected = keys.length ? this.selected : -1;
        this.world = { ...this.world, state: entry.state };
        await this.loadWorld(entry.state);
        if (this.closed) return;
        this.settings.chunks = 0;
        const edited = this.edited;
        this.commit();
        this.edited = edited;
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
    saveSettings(after = COMMIT_AFTER) {
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
            this.overlay = dom.el("div.lyra2-overlay");
            this.root.replaceChildren(dom.el("div.lyra2-away", { textContent: this.t("away") }));
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

export const { executionId } = host;
