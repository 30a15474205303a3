/** What is drawn over the points in two dimensions: cameras, the path, the picture's edges, the map from above. */

import { add, distance, halfHeight, matrix, turned } from "./path.mjs";

export const INK = {
    past: "#8d96a5", plan: "#f2f4f8", frozen: "#e2a44a", selected: "#ffb454", standing: "#6fb3ff", guide: "rgba(255,255,255,.32)",
    good: "#5fbf7f", fair: "#e8b04b", poor: "#e5674f", unknown: "#6b7280",
};
const SHADOW = "rgba(0,0,0,.55)";
const FRUSTUM = 0.09;           // of the scene's depth

/** A function from world points to [x, y, depth] in CSS pixels of a view. */
export function projector(pose, fov, width, height) {
    const m = matrix(pose.R), [X, Y, Z] = pose.T, focal = height / 2 / halfHeight(fov);
    return ([x, y, z]) => {
        x -= X; y -= Y; z -= Z;
        const depth = m[2] * x + m[5] * y + m[8] * z;
        return [width / 2 + (focal * (m[0] * x + m[3] * y + m[6] * z)) / depth, height / 2 + (focal * (m[1] * x + m[4] * y + m[7] * z)) / depth, depth];
    };
}

/** A 2D canvas as large as its element on the screen; the context draws in the element's own CSS pixels. */
export function fitted(canvas) {
    const rect = canvas.getBoundingClientRect(), width = canvas.clientWidth, height = canvas.clientHeight;
    const by = (rect.width / Math.max(width, 1)) * Math.min(devicePixelRatio || 1, 2);
    const [w, h] = [Math.round(width * by), Math.round(height * by)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const context = canvas.getContext("2d");
    context.setTransform(by, 0, 0, by, 0, 0);
    context.clearRect(0, 0, width, height);
    return { context, width, height };
}

/** Corners of a camera's picture, `away` before it. */
export function frustum(pose, aspect, away) {
    const h = away * halfHeight(pose.fov), w = h * aspect;
    return [[-w, -h], [w, -h], [w, h], [-w, h]].map(([x, y]) => add(pose.T, turned(pose.R, [x, y, away])));
}

/** Draws strokes twice, dark and wide below, so that they are seen on any picture. */
class Pen {
    constructor(context, project) {
        this.context = context;
        this.project = project;
    }

    line(points, colour, width = 1.5, dash = []) {
        const { context, project } = this, near = 1e-3;
        context.setLineDash(dash);
        context.lineJoin = context.lineCap = "round";
        context.beginPath();
        let before = null;
        for (const point of points) {
            const at = project(point);
            if (at[2] > near && before) context.lineTo(at[0], at[1]);
            else if (at[2] > near) context.moveTo(at[0], at[1]);
            before = at[2] > near ? at : null;
        }
        context.strokeStyle = SHADOW;
        context.lineWidth = width + 2;
        context.stroke();
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.stroke();
        context.setLineDash([]);
    }

    dot(point, radius, colour, ring = SHADOW) {
        const [x, y, depth] = this.project(point), { context } = this;
        if (depth <= 1e-3) return;
        context.beginPath();
        context.arc(x, y, radius, 0, 7);
        context.fillStyle = colour;
        context.fill();
        context.strokeStyle = ring;
        context.lineWidth = 1.5;
        context.stroke();
    }

    text(point, words, colour) {
        const [x, y, depth] = this.project(point), { context } = this;
        if (depth <= 1e-3) return;
        context.font = "600 11px system-ui, sans-serif";
        context.textAlign = "center";
        context.lineWidth = 3;
        context.strokeStyle = SHADOW;
        context.strokeText(words, x, y - 9);
        context.fillStyle = colour;
        context.fillText(words, x, y - 9);
    }
}

/**
 * The view's overlay.
 * @param {{pose, fov, aspect, depth, past: object[], poses: object[], marks: string[], keys: object[], standing: object,
 *   selected: number, hovered: number, frozen: ?object[], scrub: ?object, pivot: ?number[], guide: ?number, chunkFrames: number}} shown
 * @returns {{keys: {index: number, x: number, y: number}[]}} where keys can be clicked
 */
export function drawOverlay(canvas, shown) {
    const { context, width, height } = fitted(canvas);
    const project = projector(shown.pose, shown.fov, width, height), pen = new Pen(context, project);
    const away = FRUSTUM * shown.depth, hits = [];
    if (shown.guide) drawGuide(context, width, height, shown.guide, shown.pose.fov, shown.fov);
    if (shown.cameras) {
        pen.line(shown.past.map((pose) => pose.T), INK.past, 1.5);
        shown.past.filter((_, i) => i % 16 === 0).forEach((pose) => drawFrustum(pen, pose, shown.aspect, 0.6 * away, INK.past, 1, shown.pose));
    }
    if (shown.frozen) pen.line(shown.frozen.map((pose) => pose.T), INK.frozen, 2, [5, 4]);
    drawPlan(pen, shown);
    shown.keys.forEach((key, index) => {
        const chosen = index === shown.selected, colour = chosen ? INK.selected : INK.plan;
        drawFrustum(pen, key, shown.aspect, away, colour, chosen ? 2 : 1.25, shown.pose);
        pen.dot(key.T, chosen || index === shown.hovered ? 6 : 4.5, colour);
        pen.text(key.T, String(index + 1), colour);
        const [x, y, depth] = project(key.T);
        if (depth > 1e-3) hits.push({ index, x, y });
    });
    if (shown.standing) pen.dot(shown.standing.T, 4.5, INK.standing);
    if (shown.scrub) {
        drawFrustum(pen, shown.scrub, shown.aspect, 0.8 * away, INK.standing, 1.5, shown.pose);
        pen.dot(shown.scrub.T, 3.5, INK.standing);
    }
    if (shown.pivot) pen.dot(shown.pivot, 4, "transparent", INK.selected);
    if (shown.side) context.clearRect(...shown.side);       // the side preview is below
    return { keys: hits };
}

/** The planned curve, coloured by what is known there, with a tick every 8 frames. */
function drawPlan(pen, { poses, marks, chunkFrames }) {
    if (poses.length < 2) return;
    const every = Math.max(1, Math.ceil((poses.length - 1) / Math.max(marks.length - 1, 1)));
    for (let from = 0, mark = 0; from < poses.length - 1; from += every, mark++) {
        pen.line(poses.slice(from, from + every + 1).map((pose) => pose.T), INK[marks[mark] ?? "unknown"], 2.25);
    }
    poses.forEach((pose, i) => {
        if (i && i % 8 === 0) pen.dot(pose.T, i % chunkFrames === 0 ? 3.5 : 2, INK.plan);
    });
}

function drawFrustum(pen, pose, aspect, away, colour, width, eye) {
    if (distance(pose.T, eye.T) < 0.35 * away) return;    // one stands in it
    const corners = frustum(pose, aspect, away);
    pen.line([...corners, corners[0]], colour, width);
    corners.forEach((corner) => pen.line([pose.T, corner], colour, width * 0.8));
    const up = turned(pose.R, [0, -0.35 * away * halfHeight(pose.fov), 0]);
    const [a, b] = corners, middle = a.map((v, i) => (v + b[i]) / 2 + up[i]);
    pen.line([a.map((v, i) => v + 0.3 * (b[i] - v)), middle, a.map((v, i) => v + 0.7 * (b[i] - v))], colour, width * 0.8);
}

/** The edges of the picture that a key here would take. */
function drawGuide(context, width, height, aspect, fov, shownFov) {
    const h = (height * halfHeight(fov)) / halfHeight(shownFov), w = h * aspect;
    const left = (width - w) / 2, top = (height - h) / 2, arm = Math.min(18, w / 6, h / 6);
    context.fillStyle = "rgba(10,11,13,.42)";
    context.beginPath();
    context.rect(0, 0, width, height);
    context.rect(left + w, top, -w, h);
    context.fill("evenodd");
    context.strokeStyle = INK.guide;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const [x, y, sx, sy] of [[left, top, 1, 1], [left + w, top, -1, 1], [left, top + h, 1, -1], [left + w, top + h, -1, -1]]) {
        context.moveTo(x + sx * arm, y);
        context.lineTo(x, y);
        context.lineTo(x, y + sy * arm);
    }
    context.stroke();
}

/** The map from above: x to the right, the way the photo looks upwards. Keeps its picture of the points. */
export class Minimap {
    constructor(canvas) {
        this.canvas = canvas;
    }

    /** What the map covers: the points' middle 96 %, and all of the poses. */
    frame(blocks, poses) {
        const ends = [0, 2].map((axis) => {
            const values = [];
            for (const block of blocks) {
                const step = 4 * Math.max(1, Math.floor(block.coarse / 800));
                for (let i = axis; i < 4 * block.coarse; i += step) values.push(block.positions[i]);
            }
            values.sort((a, b) => a - b);
            const cut = Math.floor(0.02 * values.length), places = poses.map((pose) => pose.T[axis]);
            return [Math.min(values[cut] ?? 0, ...places), Math.max(values[values.length - 1 - cut] ?? 1, ...places)];
        });
        const [[x0, x1], [z0, z1]] = ends;
        return { x: (x0 + x1) / 2, z: (z0 + z1) / 2, half: 0.56 * Math.max(x1 - x0, z1 - z0, 1e-6) };
    }

    /** The points, drawn once per set of blocks and size. */
    backdrop(blocks, width, height) {
        const name = `${blocks.map(({ count }) => count).join()} ${width} ${height}`;
        if (this.name === name) return;
        this.name = name;
        const image = new ImageData(width, height), tops = new Float32Array(width * height).fill(Infinity);
        const { x, z, half } = this.area, by = Math.min(width, height) / (2 * half);
        for (const block of blocks) {
            const step = Math.max(1, Math.floor(block.count / 60_000));
            for (let i = 0; i < block.count; i += step) {
                const column = Math.floor(width / 2 + (block.positions[4 * i] - x) * by);
                const row = Math.floor(height / 2 - (block.positions[4 * i + 2] - z) * by), at = row * width + column;
                if (column < 0 || row < 0 || column >= width - 1 || row >= height - 1) continue;
                const [up, colour] = [block.positions[4 * i + 1], block.colours.subarray(4 * i, 4 * i + 3)];
                // two pixels wide, so that a floor seen from the side closes
                for (const beside of [at, at + 1, at + width, at + width + 1]) {
                    if (up > tops[beside]) continue;
                    tops[beside] = up;
                    image.data.set(colour, 4 * beside);
                    image.data[4 * beside + 3] = 205;
                }
            }
        }
        this.image ??= document.createElement("canvas");
        Object.assign(this.image, { width, height });
        this.image.getContext("2d").putImageData(image, 0, 0);
    }

    draw(blocks, { pose, past, poses, keys, selected, standing, frozen }) {
        const { context, width, height } = fitted(this.canvas);
        const anchors = [...past.filter((_, i) => i % 8 === 0), ...keys, ...(standing ? [standing] : [])];
        const name = `${blocks.map(({ count }) => count).join()} ${anchors.length}`;
        if (this.framed !== name || this.outgrown(anchors)) {
            this.area = this.frame(blocks, anchors);
            this.framed = name;
            this.name = null;
        }
        this.backdrop(blocks, Math.max(2, Math.round(width)), Math.max(2, Math.round(height)));
        context.drawImage(this.image, 0, 0, width, height);
        const project = (T) => {
            const [u, v] = this.toMap(T, width, height);
            return [u, v, 1];
        };
        const pen = new Pen(context, project);
        pen.line(past.map(({ T }) => T), INK.past, 1.5);
        if (frozen) pen.line(frozen.map(({ T }) => T), INK.frozen, 1.5, [4, 3]);
        if (poses.length > 1) pen.line(poses.map(({ T }) => T), INK.plan, 1.75);
        keys.forEach((key, i) => pen.dot(key.T, i === selected ? 4.5 : 3.25, i === selected ? INK.selected : INK.plan));
        if (standing) pen.dot(standing.T, 3, INK.standing);
        this.heading(context, pose, width, height);
    }

    outgrown(anchors) {
        const { x, z, half } = this.area;
        return anchors.some(({ T }) => Math.abs(T[0] - x) > half || Math.abs(T[2] - z) > half);
    }

    heading(context, pose, width, height) {
        const [u, v] = this.toMap(pose.T, width, height), [x, , z] = turned(pose.R, [0, 0, 1]), at = Math.atan2(-z, x);
        const open = Math.min(1.2, (pose.fov * Math.PI) / 360);
        const [cu, cv] = [Math.max(4, Math.min(width - 4, u)), Math.max(4, Math.min(height - 4, v))];
        context.beginPath();
        context.moveTo(cu, cv);
        context.arc(cu, cv, 22, at - open, at + open);
        context.closePath();
        context.fillStyle = "rgba(255,180,84,.32)";
        context.fill();
        context.beginPath();
        context.arc(cu, cv, 3.5, 0, 7);
        context.fillStyle = INK.selected;
        context.fill();
    }

    toMap(T, width, height) {
        const { x, z, half } = this.area, by = Math.min(width, height) / (2 * half);
        return [width / 2 + (T[0] - x) * by, height / 2 - (T[2] - z) * by];
    }

    /** World x and z under a place of the map. */
    fromMap(u, v) {
        const { x, z, half } = this.area, { clientWidth: width, clientHeight: height } = this.canvas, by = Math.min(width, height) / (2 * half);
        return [x + (u - width / 2) / by, z - (v - height / 2) / by];
    }
}
