"""A ComfyUI node that loads a rectiflow checkpoint as what it is: flow, v or eps.

Copy this folder to ComfyUI/custom_nodes/rectiflow. The node "Load rectiflow checkpoint" stands in
place of CheckpointLoaderSimple and has its outputs. It reads the file's header, where rectiflow
writes what the model predicts and with which shift it is sampled, and sets the model's sampling
with ComfyUI's own nodes, ModelSamplingSD3 or ModelSamplingDiscrete. Nothing of ComfyUI is changed.
What it did stands on the node's face.
"""

import json
import logging
import math
import os
import struct

DEFAULT_SHIFT = 6.0
MAX_HEADER_BYTES = 100_000_000
PARAMETERIZATION = "rectiflow.parameterization"
SHIFT = "rectiflow.shift"


def metadata(path):
    """The texts in the header of a safetensors file. Raises ValueError if it is none."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is no whole safetensors file: its header does not fit")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    return texts if isinstance(texts, dict) else {}


def sampling(texts, shift):
    """What a file's header asks for: ComfyUI's node with its inputs, or None, and a sentence.

    `shift` is the user's, 0 for the file's. Raises ValueError for a header that says nothing, or
    something unknown.
    """
    predicts = texts.get(PARAMETERIZATION)
    if predicts == "flow":
        shift, source = flow_shift(texts, shift)
        said = f"flow: ModelSamplingSD3 with shift {shift:g} ({source})"
        return ("ModelSamplingSD3", {"shift": shift}), said
    if predicts in ("v", "v_ztsnr"):
        inputs = {"sampling": "v_prediction", "zsnr": predicts == "v_ztsnr"}
        zsnr = " and zero terminal SNR" if inputs["zsnr"] else ""
        return ("ModelSamplingDiscrete", inputs), f"v: v-prediction{zsnr}"
    if predicts == "eps":
        return ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}), "eps: as it is"
    if predicts is None:
        raise ValueError(
            f"the file's header has no {PARAMETERIZATION}, so it does not say what the model "
            "predicts: load it with the node Load Checkpoint"
        )
    raise ValueError(
        f"{PARAMETERIZATION} is {predicts!r}, expected flow, eps, v or v_ztsnr: a newer version of "
        "this node may know it"
    )


def flow_shift(texts, shift):
    """The shift to sample with, and where it is from."""
    if shift > 0:
        return shift, "set here"
    if SHIFT not in texts:
        return DEFAULT_SHIFT, "the file names none"
    try:
        shift = float(texts[SHIFT])
    except (TypeError, ValueError):
        shift = math.nan
    if not 0 < shift < math.inf:
        raise ValueError(f"{SHIFT} is {texts[SHIFT]!r}, expected a positive number")
    return shift, "from the file"


class LoadRectiflowCheckpoint:
    """CheckpointLoaderSimple, and the model's sampling as the file says."""

    CATEGORY = "loaders"
    DESCRIPTION = "Loads a checkpoint of rectiflow and sets its sampling: flow, v or eps."
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        import folder_paths

        help_shift = "0 takes the shift that the file names; 3 to 6 is the useful range."
        bounds = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": help_shift}
        return {
            "required": {
                "ckpt_name": (folder_paths.get_filename_list("checkpoints"),),
                "shift": ("FLOAT", bounds),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def load(self, ckpt_name, shift, unique_id=None):
        import folder_paths
        import nodes
        from comfy_extras import nodes_model_advanced

        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        # Before the weights are read, since it may be refused.
        (node, inputs), said = sampling(metadata(path), shift)
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(ckpt_name)
        patched = getattr(nodes_model_advanced, node)().patch(model, **inputs)[0]
        say(said, unique_id)
        return patched, clip, vae


def say(text, node_id):
    """Writes a text to the log and on the node's face, in versions of ComfyUI that can."""
    logging.info("rectiflow: %s", text)
    from server import PromptServer

    send = getattr(PromptServer.instance, "send_progress_text", None)
    if send is not None and node_id is not None:
        send(text, node_id)


NODE_CLASS_MAPPINGS = {"LoadRectiflowCheckpoint": LoadRectiflowCheckpoint}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadRectiflowCheckpoint": "Load rectiflow checkpoint"}
