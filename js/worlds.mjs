/** What the server knows of saved worlds: summaries, point blocks, pictures, preflight. One client for the whole page. */

import { quaternion } from "./path.mjs";

/** @typedef {{frame: number, fx: number, fy: number, cx: number, cy: number, c2w: Float32Array}} View */
/**
 * @typedef {object} Block  the points that one chunk adds
 * @property {number} count
 * @property {Float32Array} positions  x, y, z and the size of a pixel there, world space; level by level, so any prefix is an even thinning
 * @property {Uint8Array} colours  r, g, b and 255 where it was invented, else 0
 * @property {number[]} levelEnds  points up to and with each level
 * @property {number[]} strides  of each level, pixels
 * @property {number} coarse  how many points the first two levels have: those that are counted while a path is dragged
 * @property {number} coarseStride  pixels between them
 * @property {{R: number[], T: number[], fov: number}[]} cameras  of every frame of the chunk
 * @property {View[]} views
 * @property {number[]} size  height, width
 */

export class WorldError extends Error {
    constructor(message, status) {
        super(message);
        this.status = status;
    }
}

const OVERTAKEN = 409;          // by a newer question of the same client
const HEADER = 40, VIEW = 80, CAMERA = 52, POINT = 10, VERSION = 1;

/** A block's bytes as arrays. WorldError if they are no block, of another version, or cut off. */
export function decodeBlock(buffer) {
    const view = new DataView(buffer), bytes = buffer.byteLength;
    const magic = bytes >= HEADER ? String.fromCharCode(...new Uint8Array(buffer, 0, 4)) : "";
    if (magic !== "LYPC") throw new WorldError(`this is no point block: ${bytes} bytes that begin with ${JSON.stringify(magic)}`);
    const version = view.getUint16(4, true), header = view.getUint16(6, true);
    if (version !== VERSION) throw new WorldError(`point block version ${version}; this page reads ${VERSION}. Reload the page after updating the pack`);
    const [count, V, F, L] = [8, 12, 16, 20].map((at) => view.getUint32(at, true));
    const needed = header + V * VIEW + F * CAMERA + 4 * L * V + count * POINT;
    if (bytes !== needed) throw new WorldError(`a point block of ${bytes} bytes that should have ${needed}; it was cut off on the way`);
    const size = [view.getUint16(26, true), view.getUint16(24, true)];
    const floats = (at, length) => new Float32Array(buffer, at, length);
    let at = header;
    const views = Array.from({ length: V }, (_, v) => {
        const from = at + v * VIEW, [fx, fy, cx, cy] = floats(from + 4, 4);
        const [near, logRatio] = floats(from + 68, 2);
        return { frame: view.getInt32(from, true), fx, fy, cx, cy, c2w: floats(from + 20, 12), near, logRatio, stride: view.getUint16(from + 76, true) };
    });
    at += V * VIEW;
    const cameras = Array.from({ length: F }, (_, f) => {
        const m = floats(at + f * CAMERA, 13);
        return { R: quaternion([m[0], m[1], m[2], m[4], m[5], m[6], m[8], m[9], m[10]]), T: [m[3], m[7], m[11]], fov: m[12] };
    });
    at += F * CAMERA;
    const counts = Array.from({ length: L }, (_, l) => Array.from({ length: V }, (_, v) => view.getUint32(at + 4 * (l * V + v), true)));
    at += 4 * L * V;
    const found = counts.flat().reduce((a, b) => a + b, 0);
    if (found !== count) throw new WorldError(`a point block of ${count} points whose levels have ${found}`);
    return { count, views, cameras, size, ...levelsOf(counts, views), ...lift(buffer, at, count, counts, views) };
}

function levelsOf(counts, views) {
    const levelEnds = [], strides = [];
    let end = 0;
    counts.forEach((row, level) => {
        end += row.reduce((a, b) => a + b, 0);
        levelEnds.push(end);
        // views may begin at different strides; the level is as fine as its coarsest view
        strides.push(Math.max(1, ...views.map((view) => view.stride >> level)));
    });
    const second = Math.min(1, counts.length - 1);
    return { levelEnds, strides, coarse: levelEnds[second] ?? 0, coarseStride: strides[second] ?? 1 };
}

function lift(buffer, at, count, counts, views) {
    const positions = new Float32Array(4 * count), colours = new Uint8Array(4 * count), frames = new Int32Array(count);
    const [xs, ys, ds] = [0, 2, 4].map((bytes) => new Uint16Array(buffer, at + bytes * count, count));
    const rgb = new Uint8Array(buffer, at + 6 * count), flags = rgb.subarray(3 * count);
    let i = 0;
    for (const row of counts) {
        row.forEach((length, v) => {
            const { frame, fx, fy, cx, cy, c2w: m, near, logRatio } = views[v];
            for (const end = i + length; i < end; i++) {
                const z = near * Math.exp((ds[i] / 65535) * logRatio), x = ((xs[i] - cx) / fx) * z, y = ((ys[i] - cy) / fy) * z;
                for (let k = 0; k < 3; k++) {
                    positions[4 * i + k] = m[4 * k] * x + m[4 * k + 1] * y + m[4 * k + 2] * z + m[4 * k + 3];
                    colours[4 * i + k] = rgb[3 * i + k];
                }
                positions[4 * i + 3] = z / fx;
                colours[4 * i + 3] = flags[i] & 1 ? 255 : 0;
                frames[i] = frame;
            }
        });
    }
    return { positions, colours, frames };
}

/** A request with a file, or an object as JSON. */
const posted = (body) => ({ method: "POST", ...(body instanceof Blob ? { body } : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }) });

/** Blocks and summaries, fetched once and kept while there is room. */
export class Worlds {
    constructor(api, roomBytes = 512e6) {
        this.api = api;
        this.room = roomBytes;
        this.blocks = new Map();        // "folder state" -> {block, bytes}, the least recently used first
        this.running = new Map();       // "folder state" -> promise
    }

    /** The answer to a question; WorldError with the server's own words if it is refused. */
    async fetch(path, options) {
        const answer = await this.api.fetchApi(path, options);
        if (answer.ok) return answer;
        const text = await answer.text();
        let message = text;
        try {
            message = JSON.parse(text).error ?? text;
        } catch { /* not JSON: said as it came */ }
        throw new WorldError(message || `${answer.status} ${answer.statusText}`, answer.status);
    }

    async json(path, options) {
        return (await this.fetch(path, options)).json();
    }

    /** {folder, latest, state, size, depth, frames, chain, tree} of the state, or of the latest one. */
    async world(folder, state = "") {
        return this.json(`/lyra2/world?${new URLSearchParams({ folder, state })}`);
    }

    cached(folder, state) {
        return this.blocks.get(`${folder} ${state}`)?.block;
    }

    /** @returns {Promise<Block>} */
    block(folder, state) {
        const key = `${folder} ${state}`, kept = this.blocks.get(key);
        if (kept) {
            this.blocks.delete(key);
            this.blocks.set(key, kept);
            return Promise.resolve(kept.block);
        }
        if (!this.running.has(key)) {
            this.running.set(key, this.fetchBlock(folder, state, key).finally(() => this.running.delete(key)));
        }
        return this.running.get(key);
    }

    async fetchBlock(folder, state, key) {
        // the host asks for no-cache by itself; a state's points never change
        const answer = await this.fetch(`/lyra2/points/${state}?${new URLSearchParams({ folder })}`, { cache: "default" });
        const buffer = await answer.arrayBuffer();
        const block = decodeBlock(buffer);
        this.keep(key, block);
        return block;
    }

    keep(key, block) {
        this.blocks.set(key, { block, bytes: block.count * 24 });
        let total = [...this.blocks.values()].reduce((sum, kept) => sum + kept.bytes, 0);
        for (const [oldest, { bytes }] of this.blocks) {
            if (total <= this.room || oldest === key) break;
            this.blocks.delete(oldest);
            total -= bytes;
        }
    }

    /** A path's text made by the server: from a preset, or from a camera file. */
    async pathFrom(route, body, query = {}) {
        return (await this.json(`/lyra2/${route}?${new URLSearchParams(query)}`, posted(body))).path;
    }

    presets() {
        return this.json("/lyra2/presets");
    }

    /** The planned cameras in one of the pack's formats: {name, blob}. */
    async cameraFile(body) {
        const answer = await this.fetch("/lyra2/path", posted(body));
        const name = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition"))?.[1] ?? "path";
        return { name, blob: await answer.blob() };
    }

    frameUrl(folder, state, frame, width) {
        return this.api.apiURL(`/lyra2/frame/${state}/${frame}?${new URLSearchParams({ folder, width: String(width) })}`);
    }
}

/** The server's answers to the newest question only; an older one is given up. */
export class Latest {
    constructor(worlds) {
        this.worlds = worlds;
    }

    /** The answer, or null if a newer question was asked meanwhile. */
    async preflight(body) {
        this.control?.abort();
        const control = (this.control = new AbortController());
        try {
            const answer = await this.worlds.json("/lyra2/preflight", { ...posted(body), signal: control.signal });
            return this.control === control ? answer : null;
        } catch (error) {
            if (control.signal.aborted || error.status === OVERTAKEN) return null;
            throw error;
        }
    }

    stop() {
        this.control?.abort();
        this.control = null;
    }
}
