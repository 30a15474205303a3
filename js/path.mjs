/**
 * A planned path: its text, its frames, and what can be said of it without asking the server. Pure functions, no DOM.
 *
 * OpenCV axes (x right, y down, z forward), scene units, degrees. Curves and timing are those of
 * lyra_core/cameras/camera_path.py, coverage and clearance those of lyra_core/memory/preflight.py; tests compare them.
 */

/** @typedef {{R: number[], T: number[], fov: number}} Pose  R: quaternion x y z w of camera-to-world; fov: vertical */
/** @typedef {{size: number[], ratio: number, centre: number[]}} Lens  size: height, width; ratio: fx/fy; centre: cx, cy */

export const CURVES = ["through", "straight", "b-spline"];
export const MOTIONS = ["uniform motion", "arc length", "time"];
export const MAX_KEYS = 100;
const CELL = 4;                 // strides that a cell of the coverage grid is wide
const DURATION = 5;

// ------------------------------------------------------------------------------------------------ vectors and turns

const { fround, hypot } = Math;
const DEGREE = Math.PI / 180;
export const add = (a, b, by = 1) => [a[0] + by * b[0], a[1] + by * b[1], a[2] + by * b[2]];
export const difference = (a, b) => [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
export const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const dot4 = (a, b) => dot(a, b) + a[3] * b[3];
export const distance = (a, b) => hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);

export function unit(q) {
    const length = Math.sqrt(dot4(q, q)) || 1;
    return [q[0] / length, q[1] / length, q[2] / length, q[3] / length];
}

/** Of quaternions, x y z w. */
export function product(a, b) {
    return [
        a[3] * b[0] + b[3] * a[0] + a[1] * b[2] - a[2] * b[1],
        a[3] * b[1] + b[3] * a[1] + a[2] * b[0] - a[0] * b[2],
        a[3] * b[2] + b[3] * a[2] + a[0] * b[1] - a[1] * b[0],
        a[3] * b[3] - dot(a, b),
    ];
}

export const inverse = (q) => [-q[0], -q[1], -q[2], q[3]];

/** The vector turned by the quaternion. */
export function turned(q, v) {
    const [x, y, z, w] = q;
    const tx = 2 * (y * v[2] - z * v[1]), ty = 2 * (z * v[0] - x * v[2]), tz = 2 * (x * v[1] - y * v[0]);
    return [v[0] + w * tx + y * tz - z * ty, v[1] + w * ty + z * tx - x * tz, v[2] + w * tz + x * ty - y * tx];
}

/** A turn of so many degrees about a unit axis. */
export function about(axis, degrees) {
    const half = (degrees * DEGREE) / 2, sine = Math.sin(half);
    return [axis[0] * sine, axis[1] * sine, axis[2] * sine, Math.cos(half)];
}

/** Degrees between two rotations. */
export function angle(a, b) {
    const q = product(inverse(a), b);
    return (2 * Math.atan2(hypot(q[0], q[1], q[2]), Math.abs(q[3]))) / DEGREE;
}

/** Row-major 3x3 of a quaternion. */
export function matrix(q) {
    const [x, y, z, w] = unit(q);
    return [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ];
}

/** The quaternion of a row-major 3x3 rotation, w >= 0. */
export function quaternion(m) {
    const trace = m[0] + m[4] + m[8];
    const diagonal = [1 + 2 * m[0] - trace, 1 + 2 * m[4] - trace, 1 + 2 * m[8] - trace, 1 + trace];
    const xy = m[1] + m[3], xz = m[2] + m[6], yz = m[5] + m[7], xw = m[7] - m[5], yw = m[2] - m[6], zw = m[3] - m[1];
    const rows = [[diagonal[0], xy, xz, xw], [xy, diagonal[1], yz, yw], [xz, yz, diagonal[2], zw], [xw, yw, zw, diagonal[3]]];
    const best = unit(rows[diagonal.indexOf(Math.max(...diagonal))]);
    return best[3] < 0 ? best.map((v) => -v) : best;
}

/** Yaw (to the right), pitch (up) and roll (clockwise) in degrees of a camera whose world has y down. */
export function toAngles(q) {
    const m = matrix(q);
    const pitch = Math.asin(Math.max(-1, Math.min(1, -m[5])));
    const upright = Math.abs(m[5]) < 0.999999;
    const yaw = upright ? Math.atan2(m[2], m[8]) : Math.atan2(-m[6], m[0]);
    return [yaw / DEGREE, pitch / DEGREE, upright ? Math.atan2(m[3], m[4]) / DEGREE : 0];
}

export function fromAngles(yaw, pitch, roll) {
    return product(product(about([0, 1, 0], yaw), about([1, 0, 0], pitch)), about([0, 0, 1], roll));
}

/** Half as high as the picture of a vertical field of view, at distance 1. */
export const halfHeight = (fov) => Math.tan((fov * DEGREE) / 2);
export const mmOf = (fov, ratio) => 18 / (halfHeight(fov) * ratio);
export const fovOf = (mm, ratio) => (2 * Math.atan(18 / (mm * ratio))) / DEGREE;

// -------------------------------------------------------------------------------------------------------- the curve

/** Moments of `count` even steps from 0 to 1, rounded as torch.linspace does. */
function linspace(count) {
    const step = 1 / (count - 1), half = count >> 1;
    return Array.from({ length: count }, (_, i) => (i < half ? step * i : 1 - step * (count - 1 - i)));
}

/** The same keys at equal distances in time, the last at `duration` seconds. */
export function spaced(keys, duration) {
    return keys.map((key, i) => ({ ...key, timestamp: (duration * (i + 1)) / keys.length }));
}

/** How the curve goes: a CameraPath of the Python side. */
export function curveOf(plan, keys) {
    return {
        keys, loop: plan.loop, order: plan.curve === "straight" ? 1 : plan.order, before: plan.before,
        through: plan.curve === "through",
    };
}

/** Poses at the moments (0 to 1) of {keys, order, loop, through, before}. */
export function evaluate(curve, moments) {
    const keys = curve.keys.map(({ R, T, fov, timestamp }) => ({ q: canonical(R), v: [...T, fov], timestamp }));
    const before = curve.before && { q: canonical(curve.before.R), v: [...curve.before.T, curve.before.fov] };
    const stamps = keys.map((key) => fround(key.timestamp));
    const at = (i) => keys[curve.loop ? ((i % keys.length) + keys.length) % keys.length : Math.max(0, Math.min(keys.length - 1, i))];
    return moments.map((t) => {
        const [segment, u] = segmentOf(stamps, curve.loop, t);
        const { q, v } = curve.through
            ? throughKeys(at, keys.length, curve.loop, before, segment, u)
            : bSpline(at, curve.order, segment, u);
        return { R: unit(q), T: [fround(v[0]), fround(v[1]), fround(v[2])], fov: fround(v[3]) };
    });
}

function canonical(R) {
    const q = unit(R);
    return q[3] < 0 ? q.map((v) => -v) : q;
}

/** The key before the moment and how far from it to the next. Single precision, as the reference decides it. */
function segmentOf(stamps, loop, t) {
    t = fround(t);
    if (stamps.length === 1) return [0, t];
    const last = stamps.length - (loop ? 1 : 2);
    const now = fround(t * stamps[last]);
    let segment = 0;
    while (segment < stamps.length && stamps[segment] <= now) segment++;
    segment = Math.min(segment, last);
    const begin = segment ? stamps[segment - 1] : 0;
    return [segment, fround(fround(now - begin) / Math.max(fround(stamps[segment] - begin), 1e-12))];
}

function bSplineWeights(order, u) {
    const v = 1 - u;
    if (order === 0) return [0, [u < 0.5 ? 1 : 0, u >= 0.5 ? 1 : 0]];
    if (order === 1) return [0, [v, u]];
    if (order === 2) return [-1, [(v * v) / 2, 0.5 + u * v, (u * u) / 2]];
    return [-1, [v ** 3 / 6, (4 - 6 * u ** 2 + 3 * u ** 3) / 6, (4 - 6 * v ** 2 + 3 * v ** 3) / 6, u ** 3 / 6]];
}

function bSpline(at, order, segment, u) {
    const [first, weights] = bSplineWeights(order, u);
    const q = [0, 0, 0, 0], v = [0, 0, 0, 0];
    weights.forEach((weight, offset) => {
        const key = at(segment + first + offset), half = dot4(q, key.q) < 0 ? -weight : weight;
        for (let k = 0; k < 4; k++) {
            q[k] += half * key.q[k];
            v[k] += weight * key.v[k];
        }
    });
    return { q, v };
}

function throughKeys(at, count, loop, neighbour, segment, u) {
    let [k0, k1, k2, k3] = [-1, 0, 1, 2].map((offset) => at(segment + offset));
    if (!loop && segment === 0) k0 = neighbour ? cameFrom(neighbour, k1, k2) : beyond(k1, k2);
    if (!loop && segment >= count - 2) k3 = beyond(k2, k1);
    const inner = slerp(lean(k0.q, k1.q, k2.q), lean(k1.q, k2.q, k3.q), u);
    return { q: slerp(slerp(k1.q, k2.q, u), inner, 2 * u * (1 - u)), v: catmullRom(k0.v, k1.v, k2.v, k3.v, u) };
}

/** Where the path would have come from had it always gone on as from `here` to `next`. */
function beyond(here, next) {
    return { q: product(here.q, product(inverse(next.q), here.q)), v: here.v.map((v, i) => 2 * v - next.v[i]) };
}

/** A key in the direction of the neighbour, as far from `here` as `next` is: only its direction counts. */
function cameFrom(neighbour, here, next) {
    const scaled = (v, length) => {
        const own = hypot(...v);
        return v.map((value) => (value / Math.max(own, 1e-12)) * length);
    };
    const back = scaled(difference(neighbour.v, here.v), distance(next.v, here.v));
    const half = scaled(log(product(inverse(here.q), neighbour.q)), hypot(...log(product(inverse(here.q), next.q))));
    return { q: product(here.q, exp(half)), v: [...add(here.v, back), neighbour.v[3]] };
}

/** Centripetal in space, which makes no loops where keys are unevenly far apart. */
function catmullRom(p0, p1, p2, p3, u) {
    const roots = [[p0, p1], [p1, p2], [p2, p3]].map(([a, b]) => Math.sqrt(distance(a, b)));
    const widest = Math.max(...roots);
    const gaps = roots.map((gap) => (widest > 0 ? Math.max(gap, widest / 10) : 1));
    const w = 1 - u;
    return p1.map((_, i) => {
        const [before, here, after] = i < 3 ? gaps : [1, 1, 1];
        const slope1 = (p1[i] - p0[i]) / before - (p2[i] - p0[i]) / (before + here) + (p2[i] - p1[i]) / here;
        const slope2 = (p2[i] - p1[i]) / here - (p3[i] - p1[i]) / (here + after) + (p3[i] - p2[i]) / after;
        return p1[i] * (1 + 2 * u) * w * w + p2[i] * (3 - 2 * u) * u * u + here * (slope1 * u * w * w - slope2 * u * u * w);
    });
}

/** Half the turn, axis times radians, the shorter way round. */
function log(q) {
    const sign = q[3] < 0 ? -1 : 1, sine = hypot(q[0], q[1], q[2]);
    const share = (sign * Math.atan2(sine, sign * q[3])) / Math.max(sine, 1e-12);
    return [q[0] * share, q[1] * share, q[2] * share];
}

function exp(half) {
    const turn = hypot(...half), share = turn > 0 ? Math.sin(turn) / turn : 1;
    return [half[0] * share, half[1] * share, half[2] * share, Math.cos(turn)];
}

function lean(before, here, after) {
    const back = inverse(here), a = log(product(back, before)), b = log(product(back, after));
    return product(here, exp([-(a[0] + b[0]) / 4, -(a[1] + b[1]) / 4, -(a[2] + b[2]) / 4]));
}

export function slerp(a, b, u) {
    if (dot4(a, b) < 0) b = [-b[0], -b[1], -b[2], -b[3]];
    const apart = Math.sqrt(a.reduce((sum, v, i) => sum + (v - b[i]) ** 2, 0));
    const along = Math.sqrt(a.reduce((sum, v, i) => sum + (v + b[i]) ** 2, 0));
    const turn = 2 * Math.atan2(apart, along), sine = Math.max(Math.sin(turn), 1e-12);
    const [wa, wb] = turn < 1e-6 ? [1 - u, u] : [Math.sin((1 - u) * turn) / sine, Math.sin(u * turn) / sine];
    return unit([wa * a[0] + wb * b[0], wa * a[1] + wb * b[1], wa * a[2] + wb * b[2], wa * a[3] + wb * b[3]]);
}

// ------------------------------------------------------------------------------------------------------ even motion

/** Moments (0 to 1) that make the motion even: by "uniform motion", "arc length", or the keys' own "time". */
export function resample(curve, frames, by) {
    const even = linspace(frames);
    if (by === "time") return even;
    const index = evenIndex(motion(evaluate(curve, linspace(10 * frames)), by), frames);
    return index.map((value, i) => (i === 0 || i === frames - 1 ? even[i] : value / (10 * frames - 1)));
}

/** How much happens in each step between poses. */
export function motion(poses, by) {
    const travel = poses.slice(1).map((pose, i) => distance(pose.T, poses[i].T));
    if (by === "arc length") return travel;
    // through single precision, whose trembling is part of what the Python side measures
    const turns = poses.map((pose) => quaternion(matrix(pose.R).map(fround)));
    const turn = turns.slice(1).map((q, i) => 2 * hypot(...log(product(inverse(turns[i]), q))));
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const scale = sum(travel) / Math.max(sum(turn), 0.05);
    return turn.map((value, i) => value + (scale > 0 ? travel[i] / scale : 0));
}

function evenIndex(steps, frames) {
    const amount = [0];
    for (const step of steps) amount.push(amount.at(-1) + step);
    const total = amount.at(-1);
    if (total <= 1e-8) return linspace(frames).map((t) => t * steps.length);
    let before = 0;
    return linspace(frames).map((t) => {
        const wanted = t * total;
        while (before < steps.length - 1 && amount[before + 1] <= wanted) before++;
        return before + Math.min((wanted - amount[before]) / Math.max(steps[before], 1e-12), 1);
    });
}

/** `frames` poses of the curve; an open B-spline is held at its ends so that it reaches them. */
export function posesOf(curve, frames, by) {
    if (!curve.loop && by !== "time") {
        const duration = curve.keys.at(-1).timestamp || 1;
        const keys = curve.through ? curve.keys : [curve.keys[0], ...curve.keys, curve.keys.at(-1)];
        curve = { ...curve, keys: spaced(keys, duration) };
    }
    return evaluate(curve, resample(curve, frames, by));
}

// ------------------------------------------------------------------------------------------------- the plan's text

/**
 * @typedef {object} Plan  what the text input `path` holds
 * @property {Pose[]} keys  after the one where it stands
 * @property {string} curve  one of CURVES
 * @property {number} order  of the B-spline
 * @property {string} from  key of the state it goes on from; empty: the photo
 * @property {number} frames  1 + frames per chunk times chunks
 * @property {Object<string, string>} captions  by frame of this path
 */

export class PathTextError extends Error {}

/** @returns {Plan} */
export function emptyPlan() {
    return {
        keys: [], curve: "through", order: 3, loop: false, duration: DURATION, from: "", frames: 81,
        motion: MOTIONS[0], captions: {}, seed: 1, before: null, other: {}, otherOurs: {},
    };
}

/** The plan in a camera-path JSON, its first key (where it stands) left out; PathTextError says what is wrong. */
export function parsePlan(text) {
    if (!text.trim()) return emptyPlan();
    let record;
    try {
        record = JSON.parse(text);
    } catch (error) {
        throw new PathTextError(String(error.message));
    }
    if (typeof record !== "object" || record === null || !Array.isArray(record.path)) throw new PathTextError('no list "path" in it');
    const { path, spline_order = 3, through_keys, loop = false, duration_seconds = DURATION, time, lyra2 = {}, ...other } = record;
    const keys = path.map(parseKey);
    const { version, from = "", frames = 81, motion: by = MOTIONS[0], captions = {}, seed = 1, before, ...otherOurs } = lyra2;
    if (![0, 1, 2, 3].includes(spline_order)) throw new PathTextError(`spline_order ${spline_order}`);
    if (!MOTIONS.includes(by)) throw new PathTextError(`motion ${JSON.stringify(by)}`);
    if (!Number.isInteger(frames) || frames < 1) throw new PathTextError(`frames ${JSON.stringify(frames)}`);
    if (!/^([0-9a-f]{8,64})?$/.test(from)) throw new PathTextError(`from ${JSON.stringify(from)}`);
    const through = Boolean(through_keys);
    return {
        keys: keys.slice(1), loop, duration: duration_seconds, from, frames, motion: by, captions, seed,
        curve: through ? "through" : spline_order === 1 ? "straight" : "b-spline",
        order: spline_order === 1 ? 3 : spline_order, before: before ? parseKey(before, "before") : null,
        other: { time, ...other }, otherOurs: { version, ...otherOurs },
    };
}

function parseKey(key, index) {
    const numbers = (value, length) => Array.isArray(value) && value.length === length && value.every(Number.isFinite);
    if (!numbers(key?.R, 4) || hypot(...key.R) < 1e-6) throw new PathTextError(`key ${index}: R ${JSON.stringify(key?.R)}`);
    if (!numbers(key.T, 3)) throw new PathTextError(`key ${index}: T ${JSON.stringify(key.T)}`);
    if (!(key.fov > 0 && key.fov < 180)) throw new PathTextError(`key ${index}: fov ${JSON.stringify(key.fov)}`);
    return { ...key, R: unit(key.R) };
}

const rounded = (value) => Math.round(value * 1e6) / 1e6;

function formatKey(key) {
    return { up_dir: [0, 1, 0], ...key, R: unit(key.R).map(rounded), T: key.T.map(rounded), fov: rounded(key.fov) };
}

/** The text of a plan that begins at `standing`. Without keys the list is empty. */
export function formatPlan(plan, standing) {
    const keys = plan.keys.length ? spaced([standing, ...plan.keys], plan.duration).map(formatKey) : [];
    const ours = { frames: plan.frames, motion: plan.motion, captions: plan.captions, seed: plan.seed };
    if (plan.before) ours.before = { R: plan.before.R.map(rounded), T: plan.before.T.map(rounded), fov: rounded(plan.before.fov) };
    return JSON.stringify({
        ...plan.other, loop: plan.loop, time: plan.other.time ?? 0, duration_seconds: plan.duration,
        spline_order: plan.curve === "straight" ? 1 : plan.order, through_keys: plan.curve === "through",
        path: keys.map((key) => ({ ...key, timestamp: rounded(key.timestamp) })),
        lyra2: { ...plan.otherOurs, version: 1, from: plan.from, ...ours },
    });
}

/** Every frame of the plan, the first exactly where it stands; only that one if there are no keys. */
export function framesOf(plan, standing, frames = plan.frames) {
    if (!plan.keys.length || frames < 2) return [standing];
    const keys = [standing, ...plan.keys];
    const poses = posesOf(curveOf(plan, spaced(keys, plan.duration)), frames, plan.motion);
    poses[0] = standing;
    return poses;
}

// -------------------------------------------------------------------------------------------------- live preflight

/** Columns and rows of the grid in which points so many pixels apart are counted: with smaller cells near surfaces come apart. */
export function gridOf([height, width], stride) {
    return [width, height].map((side) => Math.max(1, Math.round(side / (CELL * stride))));
}

/** Share of the picture's grid in which some point lies in front; points: x, y, z, size one after the other. */
export function coverage(pose, lens, points, count, grid) {
    const [columns, rows] = grid, [height, width] = lens.size, [cx, cy] = lens.centre, m = matrix(pose.R), [X, Y, Z] = pose.T;
    const fy = height / 2 / halfHeight(pose.fov), fx = fy * lens.ratio;
    const seen = new Uint8Array(columns * rows);
    for (let i = 0, end = 4 * count; i < end; i += 4) {
        const x = points[i] - X, y = points[i + 1] - Y, z = points[i + 2] - Z;
        const depth = m[2] * x + m[5] * y + m[8] * z;
        if (depth <= 0) continue;
        const column = Math.floor((((fx * (m[0] * x + m[3] * y + m[6] * z)) / depth + cx + 0.5) / width) * columns);
        if (column < 0 || column >= columns) continue;
        const row = Math.floor((((fy * (m[1] * x + m[4] * y + m[7] * z)) / depth + cy + 0.5) / height) * rows);
        if (row >= 0 && row < rows) seen[row * columns + column] = 1;
    }
    return seen.reduce((sum, cell) => sum + cell, 0) / seen.length;
}

/** Distance to the nearest point. */
export function clearance(centre, points, count) {
    const [X, Y, Z] = centre;
    let nearest = Infinity;
    for (let i = 0, end = 4 * count; i < end; i += 4) {
        const x = points[i] - X, y = points[i + 1] - Y, z = points[i + 2] - Z, square = x * x + y * y + z * z;
        if (square < nearest) nearest = square;
    }
    return Math.sqrt(nearest);
}

/** Of each chunk: travel over half the scene's depth, or turning over 22 degrees, whichever is more. */
export function effort(poses, chunkFrames, depth) {
    const chunks = Math.max(1, Math.round((poses.length - 1) / chunkFrames));
    return Array.from({ length: chunks }, (_, chunk) => {
        let travel = 0, turning = 0;
        for (let i = chunk * chunkFrames; i < Math.min((chunk + 1) * chunkFrames, poses.length - 1); i++) {
            travel += distance(poses[i].T, poses[i + 1].T);
            turning += angle(poses[i].R, poses[i + 1].R);
        }
        return Math.max(travel / (0.5 * depth), turning / 22);
    });
}

/** How many chunks the way is worth. */
export function chunksNeeded(poses, depth) {
    return Math.max(1, Math.ceil(effort(poses, Math.max(poses.length - 1, 1), depth)[0] - 1e-9));
}

export const MARKS = {
    coverage: (share) => (share >= 0.6 ? "good" : share >= 0.25 ? "fair" : "poor"),
    clearance: (distance, depth) => (distance >= 0.1 * depth ? "good" : distance >= 0.05 * depth ? "fair" : "poor"),
    effort: (amount) => (amount <= 1.5 ? "good" : amount <= 3 ? "fair" : "poor"),
};

// ------------------------------------------------------------------------------------------------------------ edits

/** At most `most` of the poses, such that the straight way between those kept is never off by more than 1: 1 % of depth or 1 degree. */
export function simplified(poses, depth, most = 30) {
    if (poses.length <= 2) return poses.slice();
    const off = (a, b, i) => {
        const u = (i - a) / (b - a), A = poses[a], B = poses[b], P = poses[i];
        const place = distance(P.T, A.T.map((v, k) => v + u * (B.T[k] - v))) / (0.01 * depth);
        return Math.max(place, angle(P.R, slerp(A.R, B.R, u)), Math.abs(P.fov - (A.fov + u * (B.fov - A.fov))));
    };
    const kept = new Set([0, poses.length - 1]);
    const gaps = [[0, poses.length - 1]];
    const worstOf = ([a, b]) => {
        let worst = 0, where = a;
        for (let i = a + 1; i < b; i++) {
            const error = off(a, b, i);
            if (error > worst) [worst, where] = [error, i];
        }
        return { a, b, worst, where };
    };
    let open = gaps.map(worstOf);
    while (kept.size < most) {
        const next = open.reduce((x, y) => (y.worst > x.worst ? y : x));
        if (next.worst <= 1) break;
        kept.add(next.where);
        open = open.filter((gap) => gap !== next).concat([[next.a, next.where], [next.where, next.b]].map(worstOf));
    }
    return [...kept].sort((a, b) => a - b).map((i) => poses[i]);
}

/** The keys moved, turned about the vertical through `pivot` and scaled from it. */
export function transformed(keys, pivot, { move = [0, 0, 0], yaw = 0, pitch = 0, scale = 1 }) {
    const turn = product(about([0, 1, 0], yaw), about([1, 0, 0], pitch));
    return keys.map((key) => ({
        ...key,
        R: unit(product(turn, key.R)),
        T: add(add(pivot, turned(turn, difference(key.T, pivot)), scale), move),
    }));
}

/** The same keys the other way: from where it stands to what was the last but one, and so back. */
export function reversed(keys, standing) {
    if (!keys.length) return [];
    return [...keys.slice(0, -1)].reverse().concat([{ ...standing }]);
}

export function thereAndBack(keys, standing) {
    return [...keys, ...reversed(keys, standing)];
}

const local = (pose, [x, y, z], yaw = 0, pitch = 0) => ({
    R: unit(product(pose.R, product(about([0, 1, 0], yaw), about([1, 0, 0], pitch)))),
    T: add(pose.T, turned(pose.R, [x, y, z])),
    fov: pose.fov,
});

const even = (count, make) => Array.from({ length: count }, (_, i) => make((i + 1) / count));

/** Looking at the point `depth` ahead of the pose from places on a circle about it. */
const around = (pose, depth, yaw, pitch) => even(4, (t) => {
    const turn = product(about([0, 1, 0], yaw * t), about([1, 0, 0], pitch * t));
    const [x, y, z] = turned(turn, [0, 0, -depth]);
    return { R: unit(product(pose.R, turn)), T: add(pose.T, turned(pose.R, [x, y, z + depth])), fov: pose.fov };
});

/** Starts for a path: name -> keys, from where it stands, in a scene this deep. */
export const STARTS = {
    "move in": (at, d) => even(2, (t) => local(at, [0, 0, 0.5 * d * t])),
    "move out": (at, d) => even(2, (t) => local(at, [0, -0.06 * d * t, -0.4 * d * t])),
    "to the left": (at, d) => even(2, (t) => local(at, [-0.3 * d * t, 0, 0])),
    "to the right": (at, d) => even(2, (t) => local(at, [0.3 * d * t, 0, 0])),
    "up": (at, d) => even(2, (t) => local(at, [0, -0.25 * d * t, 0], 0, -4 * t)),
    "look left": (at) => even(2, (t) => local(at, [0, 0, 0], -22 * t)),
    "look right": (at) => even(2, (t) => local(at, [0, 0, 0], 22 * t)),
    "orbit left": (at, d) => around(at, d, 20, 0),
    "orbit right": (at, d) => around(at, d, -20, 0),
    "spiral": (at, d) => even(8, (t) => local(at, [
        0.06 * d * Math.sin(4 * Math.PI * t), 0.04 * d * (Math.cos(4 * Math.PI * t) - 1), 0.3 * d * t])),
    "there and back": (at, d) => [local(at, [0, 0, 0.3 * d], 8), local(at, [0, 0, 0])],
};
