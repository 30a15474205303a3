/** Moving the view: flying, looking, panning, circling a point. Knows poses and held keys, nothing of the page. */

import { about, add, difference, distance, halfHeight, inverse, product, slerp, toAngles, turned, unit } from "./path.mjs";

const AXES = {
    KeyW: [0, 0, 1], KeyS: [0, 0, -1], KeyA: [-1, 0, 0], KeyD: [1, 0, 0], KeyE: [0, -1, 0], KeyQ: [0, 1, 0],
};
const TURNS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const FAST = 5, TURN_SPEED = 45, STEEPEST = 89;
const BASE = 0.25;              // of the scene's depth, per second
const GLIDE = 0.45;             // seconds that a jump takes
export const SPEEDS = [1 / 16, 64];

export const moves = (code) => code in AXES || code in TURNS;

export class Flight {
    constructor() {
        this.pose = { R: [0, 0, 0, 1], T: [0, 0, 0], fov: 50 };
        this.depth = 1;
        this.speed = 1;
        this.held = new Set();
        this.fast = false;
        this.pivot = null;              // the point that is circled
        this.goal = null;
    }

    get moving() {
        return Boolean(this.held.size || this.goal);
    }

    hold(code) {
        this.goal = null;
        this.held.add(code);
    }

    release(code) {
        this.held.delete(code);
    }

    releaseAll() {
        this.held.clear();
        this.fast = false;
    }

    faster(by) {
        this.speed = Math.min(SPEEDS[1], Math.max(SPEEDS[0], this.speed * by));
    }

    /** One frame of held keys or of a jump under way. */
    step(seconds) {
        if (this.goal) return this.glide(seconds);
        const by = this.depth * BASE * this.speed * (this.fast ? FAST : 1) * seconds;
        for (const code of this.held) {
            if (AXES[code]) {
                const [x, y, z] = AXES[code];
                const way = y ? [0, y, 0] : turned(this.pose.R, [x, 0, z]);
                this.go(add(this.pose.T, way, by));
            } else if (TURNS[code]) {
                const [yaw, pitch] = TURNS[code];
                this.turn(yaw * TURN_SPEED * seconds, pitch * TURN_SPEED * seconds);
            }
        }
    }

    go(T) {
        if (this.pivot) this.pivot = add(this.pivot, difference(T, this.pose.T));
        this.pose = { ...this.pose, T };
    }

    /** Degrees to the right and up; about the pivot if there is one. */
    turn(yaw, pitch) {
        const steep = toAngles(this.pose.R)[1];
        pitch = Math.max(-STEEPEST, Math.min(STEEPEST, steep + pitch)) - steep;
        const before = this.pose.R;
        const R = unit(product(product(about([0, 1, 0], yaw), before), about([1, 0, 0], pitch)));
        let T = this.pose.T;
        if (this.pivot) {
            const turn = product(R, inverse(before));
            T = add(this.pivot, turned(turn, difference(T, this.pivot)));
        }
        this.pose = { ...this.pose, R, T };
    }

    /** So many degrees as the mouse went across, if what is under it should go with it. */
    look(yaw, pitch) {
        this.goal = null;
        this.turn(this.pivot ? yaw : -yaw, this.pivot ? -pitch : pitch);
    }

    /** Sideways and up by shares of the picture's height, at the depth of the scene or of the pivot. */
    pan(x, y) {
        this.goal = null;
        const away = this.pivot ? distance(this.pose.T, this.pivot) : this.depth;
        const height = 2 * away * halfHeight(this.pose.fov);
        this.go(add(this.pose.T, turned(this.pose.R, [-x * height, -y * height, 0])));
    }

    /** Towards where it looks, or to the pivot without ever passing it. */
    dolly(notches) {
        this.goal = null;
        if (!this.pivot) return this.go(add(this.pose.T, turned(this.pose.R, [0, 0, 1]), notches * 0.05 * this.depth * this.speed));
        this.pose = { ...this.pose, T: add(this.pivot, difference(this.pose.T, this.pivot), 0.9 ** notches) };
    }

    /** To a pose, in a glide or at once. */
    to(pose, { glide = true } = {}) {
        this.pivot = null;
        const goal = { R: pose.R.slice(), T: pose.T.slice(), fov: pose.fov ?? this.pose.fov };
        if (glide) this.goal = { from: this.pose, to: goal, at: 0 };
        else {
            this.goal = null;
            this.pose = goal;
        }
    }

    glide(seconds) {
        const { from, to } = this.goal;
        const at = Math.min(1, this.goal.at + seconds / GLIDE), u = at * at * (3 - 2 * at);
        this.goal.at = at;
        this.pose = { R: slerp(from.R, to.R, u), T: from.T.map((v, i) => v + u * (to.T[i] - v)), fov: from.fov + u * (to.fov - from.fov) };
        if (at === 1) {
            this.pose = to;
            this.goal = null;
        }
    }
}
