"""A ComfyUI server of a few lines: the routes and the websocket that doctor talks to, with faults to plant.

    with FakeComfyUI(draw=lambda prompt: png) as server: ... server.address ...

`draw` is given a prompt and returns the PNG that its last node "makes", or raises RuntimeError for a failed execution.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import struct
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def _node(outputs, *, output_node=False, module="nodes", **inputs):
    required = {name: spec if isinstance(spec, list) else [spec, {}] for name, spec in inputs.items()}
    found = {"input": {"required": required}, "output": outputs.split(), "output_node": output_node}
    return {**found, "python_module": module}


_SAMPLER = dict(
    seed="INT", steps="INT", cfg="FLOAT", sampler_name="COMBO", scheduler="COMBO", positive="CONDITIONING",
    negative="CONDITIONING", latent_image="LATENT", denoise="FLOAT", model="MODEL",
)  # fmt: skip
_PACK = "custom_nodes.anima-regional-comfy-nodes"

#: As /object_info lists them, with what doctor's live side reads.
OBJECT_INFO = {
    "UNETLoader": _node("MODEL", unet_name=[["sub/anima-base-v1.0.safetensors", "mine.safetensors"], {}]),
    "CLIPLoader": _node("CLIP", clip_name=["COMBO", {"options": ["qwen_3_06b_base.safetensors", "clip.safetensors"]}]),
    "VAELoader": _node("VAE", vae_name=[["qwen_image_vae.safetensors", "anima_vae.safetensors"], {}]),
    "CLIPTextEncode": _node("CONDITIONING", clip="CLIP", text="STRING"),
    "EmptyLatentImage": _node("LATENT", width="INT", height="INT", batch_size="INT"),
    "LatentUpscaleBy": _node("LATENT", samples="LATENT", scale_by="FLOAT"),
    "KSampler": _node("LATENT", **_SAMPLER),
    "SamplerCustomAdvanced": _node(
        "LATENT LATENT", noise="NOISE", guider="GUIDER", sampler="SAMPLER", sigmas="SIGMAS", latent_image="LATENT"
    ),
    "CFGGuider": _node("GUIDER", model="MODEL", positive="CONDITIONING", negative="CONDITIONING", cfg="FLOAT"),
    "BasicScheduler": _node("SIGMAS", model="MODEL", scheduler="COMBO", steps="INT", denoise="FLOAT"),
    "KSamplerSelect": _node("SAMPLER", sampler_name="COMBO"),
    "RandomNoise": _node("NOISE", noise_seed="INT"),
    "VAEDecode": _node("IMAGE", samples="LATENT", vae="VAE"),
    "VAEEncode": _node("LATENT", pixels="IMAGE", vae="VAE"),
    "LoadImage": _node("IMAGE MASK", image="COMBO"),
    "ImageScaleBy": _node("IMAGE", image="IMAGE", scale_by="FLOAT"),
    "SaveImage": _node("", output_node=True, images="IMAGE", filename_prefix="STRING"),
    "PreviewImage": _node("", output_node=True, images="IMAGE"),
    "SaveLatent": _node("LATENT", output_node=True, samples="LATENT", filename_prefix="STRING"),
    "ModelSamplingAuraFlow": _node("MODEL", module="comfy_extras.nodes_model_advanced", model="MODEL", shift="FLOAT"),
    "LoraLoaderModelOnly": _node("MODEL", model="MODEL", lora_name="COMBO", strength_model="FLOAT"),
    "PathchSageAttentionKJ": _node("MODEL", module="custom_nodes.kjnodes", model="MODEL", sage_attention="COMBO"),
    "ModelAttentionBackend": _node("MODEL", model="MODEL", attention=[["auto", "pytorch attention", "sage"], {}]),
    "SolidMask": _node("MASK", value="FLOAT", width="INT", height="INT"),
    "MaskComposite": _node("MASK", destination="MASK", source="MASK", x="INT", y="INT", operation="COMBO"),
    "PrimitiveInt": _node("INT", value="INT"),
    "AnimaRegionalConditioningConcat": _node(
        "CONDITIONING RANGES", module=_PACK, region_1="CONDITIONING", region_2="CONDITIONING", base="CONDITIONING"
    ),
    "AnimaMaskToTokenGrid": _node("WEIGHTS", module=_PACK, model="MODEL", latent="LATENT", mask_1="MASK"),
    "AnimaBuildRegionalCrossAttnBias": _node(
        "BIAS", module=_PACK, ranges="RANGES", token_weights="WEIGHTS", strength="FLOAT"
    ),
    "AnimaApplyRegionalAttentionHook": _node(
        "CONDITIONING CONDITIONING", module=_PACK, positive="CONDITIONING", negative="CONDITIONING",
        bias_template="BIAS", attention_backend="COMBO", debug_shapes="BOOLEAN", model="MODEL",
    ),
}  # fmt: skip

STATS = {
    "system": {
        "comfyui_version": "0.38.1",
        "python_version": "3.12.3 (main)",
        "pytorch_version": "2.14.1+cu130",
        "argv": ["main.py", "--use-sage-attention", "--port", "1"],
    },
    "devices": [{"name": "cuda:0 Some GPU", "type": "cuda", "vram_total": 24 * 2**30}],
}


def picture(seed=0, size=256):
    """A PNG that is a picture by its spectrum: 1/f^3."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    f[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((3, size, size))
    return png(0.5 + 0.2 * _unit(np.fft.ifft2(np.fft.fft2(noise) * f**-1.5).real))


def noise(seed=0, size=256, step=0.0):
    """A PNG of decoded latent noise; with `step`, its right half is lighter by so much."""
    latent = np.random.default_rng(seed).standard_normal((3, size // 8, size // 8))
    planes = 0.4 + 0.15 * latent.repeat(8, 1).repeat(8, 2)
    planes[:, :, size // 2 :] += step
    return png(planes)


def png(planes):
    from PIL import Image

    buffer = io.BytesIO()
    pixels = (np.clip(planes, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(np.moveaxis(pixels, 0, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def _unit(array):
    return (array - array.mean()) / array.std()


class FakeComfyUI:
    """Its attributes are the faults: set them before or while it runs.

    refuse      node errors by node id: prompts are answered with 400
    steps       progress messages of a prompt
    pause       seconds between them
    die_after   closes all connections and the port after so many progress messages
    hang        paths that are never answered
    drip        paths that are answered a byte a second
    forget      a queued prompt vanishes
    busy        (number, id) of a prompt of somebody else's that runs first, and does not end
    answers     path -> (status, headers, body) instead of the usual answer
    """

    def __init__(self, draw=lambda prompt: noise()):
        self.draw = draw
        self.refuse, self.steps, self.pause, self.die_after = None, 2, 0.0, None
        self.hang, self.drip, self.forget, self.busy, self.answers = set(), set(), False, None, {}
        self.queued, self.history, self.waiting, self.deleted, self.interrupted = [], {}, [], [], []
        self.files, self.sockets, self.requests, self.log = (
            {},
            {},
            [],
            [{"t": "1", "m": "\x1b[32m[INFO]\x1b[0m Using sage attention\n"}],
        )
        self.running = None
        self.lock = threading.Lock()  # a prompt is always somewhere: waiting, running or in the history
        self.stop = threading.Event()

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: no waiting for its acknowledgement
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_GET(self):
                fake.handle(self, None)

            def do_POST(self):
                fake.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.die()

    def die(self):
        if not self.stop.is_set():
            self.stop.set()
            self.http.shutdown()
            self.http.server_close()
            for connection in list(self.sockets.values()):
                connection.close()

    def handle(self, request, body):
        url = urllib.parse.urlsplit(request.path)
        self.requests.append((request.command, url.path))
        if self.stop.is_set():
            request.close_connection = True
            return
        if url.path in self.hang:
            self.stop.wait()
            return
        if url.path == "/ws":
            self.websocket(request, urllib.parse.parse_qs(url.query)["clientId"][0])
            return
        if url.path in self.answers:
            status, headers, data = self.answers[url.path]
        else:
            with self.lock:
                status, headers, data = self.answer(url, body)
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        pieces = [data[i : i + 1] for i in range(len(data))] if url.path in self.drip else [data]
        for piece in pieces:
            request.wfile.write(piece)
            request.wfile.flush()
            if len(pieces) > 1 and self.stop.wait(0.1):
                return

    def answer(self, url, body):
        path = url.path
        found, status = {}, 200
        if path == "/system_stats":
            found = STATS
        elif path == "/object_info":
            found = OBJECT_INFO
        elif path == "/extensions":
            found = ["/extensions/core/a.js"]
        elif path == "/internal/logs/raw":
            found = {"entries": self.log}
        elif path == "/queue" and body is None:
            items = [(n, p, {}, {}, []) for n, p in self.waiting]
            running = [(0, p, {}, {}, []) for p in [self.busy, self.running] if p]
            found = {"queue_running": running, "queue_pending": items}
        elif path == "/queue":
            self.deleted += body["delete"]
            self.waiting = [(n, p) for n, p in self.waiting if p not in body["delete"]]
        elif path == "/interrupt":
            self.interrupted.append(body.get("prompt_id"))
        elif path == "/prompt" and self.refuse is not None:
            error = {
                "type": "prompt_outputs_failed_validation",
                "message": "Prompt outputs failed validation",
                "details": "",
            }
            found, status = {"error": error, "node_errors": self.refuse}, 400
        elif path == "/prompt":
            number = body.get("prompt_id") or str(uuid.uuid4())
            self.queued.append(body["prompt"])
            found = {"prompt_id": number, "number": 1, "node_errors": {}}
            if not self.forget:
                self.waiting.append((len(self.queued), number))
            if not (self.forget or self.busy):
                threading.Thread(target=self.execute, args=(number, body), daemon=True).start()
        elif path.startswith("/history/"):
            number = path.split("/")[-1]
            found = {number: self.history[number]} if number in self.history else {}
        elif path == "/view":
            return 200, {}, self.files[urllib.parse.parse_qs(url.query)["filename"][0]]
        else:
            status = 404
        return status, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def execute(self, number, body):
        prompt, client = body["prompt"], body["client_id"]
        with self.lock:
            self.waiting = [(n, p) for n, p in self.waiting if p != number]
            self.running = number
        self.send(client, "execution_start", prompt_id=number)
        self.send(client, "executing", node="sampler", prompt_id=number)
        for i in range(self.steps):
            self.send(client, "progress", value=i + 1, max=self.steps, node="sampler", prompt_id=number)
            if self.die_after is not None and i + 1 >= self.die_after:
                self.die()
                return
            if self.stop.wait(self.pause) or number in self.interrupted:
                return
        status = {"status_str": "success", "completed": True, "messages": []}
        outputs = {}
        try:
            data = self.draw(prompt)
            self.files[f"{number}.png"] = data
            last = next((n for n in prompt if prompt[n]["class_type"] in ("PreviewImage", "SaveImage")), "none")
            outputs = {last: {"images": [{"filename": f"{number}.png", "subfolder": "", "type": "temp"}]}}
        except RuntimeError as error:
            message = {"node_id": "9", "node_type": "KSampler", "exception_type": "RuntimeError"}
            message["exception_message"] = str(error)
            status = {"status_str": "error", "completed": False, "messages": [["execution_error", message]]}
        with self.lock:
            self.history[number] = {"prompt": [], "outputs": outputs, "status": status}
            if self.running == number:  # else the next one, queued as soon as this one was in the history
                self.running = None
        self.send(client, "executing", node=None, prompt_id=number)

    # ---- a websocket, one way

    def websocket(self, request, client):
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        request.send_response(101)
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        for name, value in {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.flush()
        self.sockets[client] = request.connection
        self.send(client, "status", status={})
        request.close_connection = True
        try:
            while not self.stop.is_set():
                data = request.connection.recv(1024)
                if not data or data[0] == 0x88:  # closing is answered
                    request.connection.sendall(b"\x88\x00")
                    break
        except OSError:
            pass

    def send(self, client, kind, **data):
        text = json.dumps({"type": kind, "data": data}).encode()
        length = bytes([len(text)]) if len(text) < 126 else bytes([126]) + struct.pack(">H", len(text))
        deadline = time.monotonic() + 2
        while client not in self.sockets and time.monotonic() < deadline and not self.stop.is_set():
            time.sleep(0.01)
        with contextlib.suppress(OSError, KeyError):
            self.sockets[client].sendall(b"\x81" + length + text)
