/** Where an Explorer stands: the world and its points, its states, the frames that were made. */

import { place } from "./dom.mjs";
import { icon } from "./icons.mjs";
import { page } from "./page.mjs";
import { halfHeight, parsePlan } from "./path.mjs";

/** @param {typeof Object} Base */
export const Standing = (Base) => class extends Base {
    // ---------------------------------------------------------------------------------------------------------- worlds

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
        const begin = this.panels.action("begin", () => this.beginWorld(), { classes: "primary", icon: icon("begin") });
        if (error.status === 404 && state) {
            const latest = this.panels.action("standLatest", () => this.standAtLatest());
            this.panels.setMessage(this.t("stateGone"), error.message, [latest, begin]);
        } else if (error.status === 404) this.panels.setMessage(this.t("empty"), this.t("emptyHint", { folder: this.folder }), [begin]);
        else this.panels.setMessage(this.t("noWorld"), error.message, [this.panels.action("again", () => this.loadWorld())]);
        this.refresh();
    }

    async loadBlocks(asked) {
        const { world, folder } = this, [last, ...before] = [...world.chain].reverse(), overtaken = () => asked !== this.loading || this.closed;
        this.blockKeys = world.chain.filter((state) => page.worlds.cached(folder, state));
        try {
            const newest = await page.worlds.block(folder, last);
            if (overtaken()) return;
            this.standAtEndOf(newest);
            this.blockArrived(last);
            this.takeOffered();
            // two at a time
            await Promise.all([0, 1].map(async () => {
                for (let state; !overtaken() && (state = before.shift()); ) {
                    await page.worlds.block(folder, state);
                    if (!overtaken()) this.blockArrived(state);
                }
            }));
        } catch (error) {
            if (!overtaken()) this.panels.setNotice(error.message, { bad: true, actions: [this.panels.action("again", () => this.loadWorld())] });
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

    // --------------------------------------------------------------------------------------------------------- history

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

    /** Another seed makes another chunk only if what grows the world is given the seed. */
    canReroll() {
        const given = this.node.outputs?.find(({ name }) => name === "seed")?.links?.length;
        return Boolean(given && this.world && this.grownPath() && !this.grow.busy);
    }

    grownPath() {
        return this.settings.grown.findLast(({ state }) => state === this.world?.state);
    }

    /** The same way again from where it began, with the next seed. */
    async reroll() {
        const made = this.grownPath();
        const { keys, curve, order, loop, motion, captions, frames } = parsePlan(made.path);
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
        const { clientWidth, clientHeight } = this.view, share = halfHeight(this.flight.pose.fov) / halfHeight(this.shownFov());
        const height = clientHeight * share, width = height * this.aspect;
        place(this.panels.photo, { width, height, left: (clientWidth - width) / 2, top: (clientHeight - height) / 2 });
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
};
