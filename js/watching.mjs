/** What an Explorer shows over time, and from above: recording, playing, scrubbing, the map. */

import { angle, distance, simplified } from "./path.mjs";

const FPS = 16;

/** @param {typeof Object} Base */
export const Watching = (Base) => class extends Base {
    // ---------------------------------------------------------------------------------------------- recording, playing

    toggleRecording() {
        if (!this.recording) this.recording = [];
        else {
            const poses = this.recording;
            this.recording = null;
            const off = poses.length && (distance(poses[0].T, this.standing.T) > 0.01 * this.depth || angle(poses[0].R, this.standing.R) > 1);
            const keys = simplified(poses, this.depth).slice(off || this.plan.keys.length ? 0 : 1);
            if (keys.length) this.setKeys([...this.plan.keys, ...keys], -1);
        }
    }

    togglePlay(along) {
        const wanted = along ? "along" : "side";
        if (this.playing === wanted) return this.stopPlaying();
        if (this.scrub >= this.poses.length - 1) this.scrub = 0;
        this.playing = wanted;
        this.playFrom = { frame: this.scrub, at: performance.now() };
        this.flight.pivot = null;
        this.takeStage();
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

    // ------------------------------------------------------------------------------------------------------------- map

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
        const [x, z] = this.minimap.fromMap(u, v);
        this.preview(this.withKey(index, { T: [x, this.plan.keys[index].T[1], z] }));
    }
};
