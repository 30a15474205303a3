/** A world to look at and to walk in: orbit, walk on the map that the export has, bookmarks of its cameras, headsets. */

import * as THREE from "./lib/three.module.js";
import { SparkRenderer, SplatMesh } from "./lib/spark.module.js";

const FREE = 0;
const LOOK = 0.005;         // radians a pixel
const PACE = 1.4;           // heights of the eyes a second
const canvas = document.querySelector("canvas"), nav = document.querySelector("nav"), said = document.getElementById("said");

const record = await (await fetch("./world.json")).json();
const renderer = new THREE.WebGLRenderer({ canvas, antialias: false, preserveDrawingBuffer: true });
renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
const scene = new THREE.Scene(), camera = new THREE.PerspectiveCamera(60, 1, 0.01, 1e4), rig = new THREE.Group();
rig.add(camera);
// the footprint of 3DGS as it was made: every gaussian 0.3 pixels wider, at its own opacity
scene.add(rig, new SparkRenderer({ renderer, preBlurAmount: 0.3, blurAmount: 0 }));

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
const map = record.map && { ...record.map, state: new Int8Array(bytes(record.map.state)), height: new Float32Array(bytes(record.map.height)) };
const eyes = record.eyes ?? 1.6;
const view = { mode: map ? "walk" : "orbit", yaw: 0, pitch: 0, fov: 60, target: new THREE.Vector3(), distance: 3 * eyes };

// ------------------------------------------------------------------------------------------------------------ the place

/** The map's cell under a place (three's axes: y up, z backward), or -1. */
function cellOf(place) {
    const column = Math.floor((place.x - map.corner[0]) / map.cell), row = Math.floor((-place.z - map.corner[1]) / map.cell);
    return column < 0 || row < 0 || column >= map.columns || row >= map.rows ? -1 : row * map.columns + column;
}

/** Whether a body can stand there: everything within its radius is free. */
function free(place) {
    const at = new THREE.Vector3();
    for (let angle = 0; angle < 2 * Math.PI; angle += Math.PI / 4) {
        at.set(place.x + map.radius * Math.cos(angle), 0, place.z + map.radius * Math.sin(angle));
        const cell = cellOf(at);
        if (cell < 0 || map.state[cell] !== FREE) return false;
    }
    return true;
}

/** How high over the ground the rig is: at the eyes, or at the feet if a headset tells how high the eyes are. */
const origin = () => (renderer.xr.isPresenting ? 0 : eyes);

/** Steps as far as it is free, along a wall if not straight on; the eyes follow the ground. */
function walk(step) {
    const here = rig.position;
    for (const [x, z] of [[step.x, step.z], [step.x, 0], [0, step.z]]) {
        const there = here.clone().add(new THREE.Vector3(x, 0, z));
        if (!free(there) && free(here)) continue;       // who stands where nobody can may leave
        here.copy(there);
        const cell = cellOf(here);
        if (cell >= 0 && Number.isFinite(map.height[cell])) here.y = origin() - map.height[cell];
        return;
    }
}

function pose() {
    const turn = new THREE.Euler(view.pitch, view.yaw, 0, "YXZ");
    camera.quaternion.setFromEuler(turn);
    if (view.mode === "orbit") rig.position.copy(view.target).add(new THREE.Vector3(0, 0, view.distance).applyEuler(turn));
}

/** The exported camera of a number: exactly where it stood and looked. */
function go(number) {
    const { c2w, fov } = record.cameras[number], m = c2w;
    // OpenCV's axes are turned by half a turn about x
    const turn = new THREE.Matrix4().set(m[0], -m[1], -m[2], 0, -m[4], m[5], m[6], 0, -m[8], m[9], m[10], 0, 0, 0, 0, 1);
    const euler = new THREE.Euler().setFromRotationMatrix(turn, "YXZ");
    Object.assign(view, { yaw: euler.y, pitch: euler.x, fov });
    rig.position.set(m[3], -m[7] - eyes + origin(), -m[11]);
    if (renderer.xr.isPresenting) return void (rig.rotation.y = view.yaw);      // the head turns by itself
    camera.quaternion.setFromRotationMatrix(turn);
    view.target.copy(rig.position).add(new THREE.Vector3(0, 0, -view.distance).applyQuaternion(camera.quaternion));
    resize();
    for (const button of nav.querySelectorAll("[data-camera]")) button.ariaPressed = String(Number(button.dataset.camera) === number);
}

function setMode(mode) {
    view.mode = mode;
    view.target.copy(rig.position).add(new THREE.Vector3(0, 0, -view.distance).applyQuaternion(camera.quaternion));
    for (const button of nav.querySelectorAll("[data-mode]")) button.ariaPressed = String(button.dataset.mode === mode);
}

function resize() {
    if (renderer.xr.isPresenting) return;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    renderer.setSize(width, height, false);
    camera.aspect = width / height;
    // a narrow screen shows the whole width of the picture, a wide one its whole height
    const wide = 2 * Math.atan(Math.tan(THREE.MathUtils.degToRad(view.fov) / 2) * record.aspect);
    const fit = 2 * Math.atan(Math.tan(wide / 2) / camera.aspect);
    camera.fov = Math.max(view.fov, THREE.MathUtils.radToDeg(fit));
    camera.updateProjectionMatrix();
}

// ------------------------------------------------------------------------------------------------------------- the hands

const held = new Set(), fingers = new Map();
const KEYS = { KeyW: [0, -1], ArrowUp: [0, -1], KeyS: [0, 1], ArrowDown: [0, 1], KeyA: [-1, 0], ArrowLeft: [-1, 0], KeyD: [1, 0], ArrowRight: [1, 0] };
addEventListener("keydown", (event) => KEYS[event.code] && held.add(event.code));
addEventListener("keyup", (event) => held.delete(event.code));
addEventListener("blur", () => held.clear());
addEventListener("resize", resize);
canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, event);
});
for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    fingers.set(event.pointerId, event);
    const x = event.clientX - before.clientX, y = event.clientY - before.clientY;
    if (fingers.size > 1) return move(0, -LOOK * y * eyes);        // two fingers walk
    view.yaw += LOOK * x * (view.mode === "orbit" ? -1 : 1);
    view.pitch = Math.min(1.5, Math.max(-1.5, view.pitch + LOOK * y * (view.mode === "orbit" ? -1 : 1)));
    pose();
});
canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    move(0, Math.sign(event.deltaY) * 0.25 * eyes);
}, { passive: false });

/** Radians about y: where one looks, and in a headset where the head does. */
function heading() {
    if (!renderer.xr.isPresenting) return view.yaw;
    const ahead = camera.getWorldDirection(new THREE.Vector3());
    return Math.atan2(-ahead.x, -ahead.z);
}

/** To the right and backwards, scene units. */
function move(right, back) {
    if (view.mode === "orbit") {
        view.distance = Math.max(0.1 * eyes, view.distance + back);
        view.target.add(new THREE.Vector3(right, 0, 0).applyQuaternion(camera.quaternion));
        return pose();
    }
    const step = new THREE.Vector3(right, 0, back).applyEuler(new THREE.Euler(0, heading(), 0));
    if (map) walk(step);
    else rig.position.add(step);
}

function button(text, act, data = {}) {
    const made = document.createElement("button");
    made.textContent = text;
    Object.assign(made.dataset, data);
    made.addEventListener("click", act);
    nav.append(made);
}

button("Walk", () => setMode("walk"), { mode: "walk" });
button("Orbit", () => setMode("orbit"), { mode: "orbit" });
record.bookmarks.forEach((number, place) => button(`${place + 1}`, () => go(number), { camera: number }));
if (await navigator.xr?.isSessionSupported("immersive-vr").catch(() => false)) button("VR", enter);

// ------------------------------------------------------------------------------------------------------------ a headset

/** Stands where one stood, in metres: sticks walk, the trigger goes to the next bookmark. */
async function enter() {
    const session = await navigator.xr.requestSession("immersive-vr", { requiredFeatures: ["local-floor"] });
    setMode("walk");
    renderer.xr.enabled = true;
    await renderer.xr.setSession(session);
    rig.scale.setScalar(1 / record.metres);
    rig.rotation.y = view.yaw;
    rig.position.y -= eyes;
    let visited = 0;
    session.addEventListener("select", () => go(record.bookmarks[++visited % record.bookmarks.length]));
    session.addEventListener("end", () => {
        renderer.xr.enabled = false;
        rig.scale.setScalar(1);
        rig.rotation.y = 0;
        rig.position.y += eyes;
        camera.position.set(0, 0, 0);
        pose();
        resize();
    });
}

function stroll(seconds) {
    for (const { gamepad } of renderer.xr.getSession()?.inputSources ?? []) {
        const [right, back] = gamepad?.axes.slice(-2) ?? [0, 0];       // the stick is the last pair, a touchpad comes before it
        if (Math.hypot(right, back) > 0.15) move(right * PACE * eyes * seconds, back * PACE * eyes * seconds);
    }
}

// ------------------------------------------------------------------------------------------------------------- the world

const splats = new SplatMesh({ url: record.splat });
// level, and out of OpenCV's axes: y down, z forward
const [a, b, c, d, e, f, g, h, i] = record.level;
splats.quaternion.setFromRotationMatrix(new THREE.Matrix4().set(a, b, c, 0, -d, -e, -f, 0, -g, -h, -i, 0, 0, 0, 0, 1));
scene.add(splats);
go(0);
setMode(view.mode);
let last = performance.now();
renderer.setAnimationLoop((now) => {
    const seconds = Math.min(0.1, (now - last) / 1000);
    last = now;
    for (const code of held) move(...KEYS[code].map((way) => way * PACE * eyes * seconds));
    stroll(seconds);
    renderer.render(scene, camera);
});
const ready = splats.initialized.then(() => (said.textContent = ""), (error) => (said.textContent = `${record.splat} can't be read: ${error.message}`));
globalThis.lyra2Viewer = { ready, record, view, camera, rig, go, setMode, move, free, splats };
