"""Writes tests/artifact/{golden/v1,critical,non_critical}: `python -m tests.artifact.make_golden [--damaged]`.

Version 1 is frozen: its golden files are never written again, but for a file that a new method adds. All values come
from SHA-256, so that they hang on no version of any library's generator.
"""

import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

import dtrain
from dtrain import METHODS, Calibration, Lossless, Rules
from dtrain.artifact import DIGEST_BYTES, Content, Record, Role, file_digest, pack_file
from dtrain.difference import fingerprint
from dtrain.errors import ArtifactError, BaseMismatchError
from dtrain.stages import (
    SHARED,
    Affine,
    All,
    Bernoulli,
    BFloat16,
    BlockDct,
    DeadZone,
    Groups,
    Indexed,
    LowRank,
    Mixed,
    Payload,
    Pipeline,
    Rans,
    Sign,
    Stratified,
    Transposed,
    Uniform,
    Units,
    Zstd,
    encode,
)
from dtrain.weights import digest
from tests.artifact import damaged
from tests.methods.settings import module_of, raw

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "v1"
RULES = Rules(whole=("head.*",), drop=("dropped",))
SHAPES = {
    "attn.q.weight": (6, 8), "attn.q.bias": (6,), "dense.weight": (9, 5), "conv.weight": (2, 3, 2, 2), "row": (1, 11),
    "scalar": (), "one": (1, 1), "empty": (0, 3), "norm": (7,), "tok.embed.weight": (5, 4), "größe/x": (3, 4),
    "frozen": (2, 3), "dropped": (2, 3),
}  # fmt: skip
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
#: Dtypes that only a bitwise method changes, under names of their own.
BITWISE = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip
ODD = [0.0, -0.0, 1e-45, -1e-39, 3.4e38, math.inf, -math.inf, math.nan]


def stream(label, size):
    """`size` bytes that hang on `label` only."""
    blocks = (hashlib.sha256(f"{label} {i}".encode()).digest() for i in range(-(-size // 32)))
    return b"".join(blocks)[:size]


def values(label, shape, amplitude=1.0, dtype=torch.float32):
    """Numbers from -amplitude to amplitude: multiples of 2^-15 of it."""
    numbers = torch.frombuffer(bytearray(stream(label, 2 * math.prod(shape)) or b"\0\0"), dtype=torch.int16)
    return (numbers[: math.prod(shape)].double() / 2**15 * amplitude).to(dtype).view(shape)


def model(label, amplitude=1.0):
    state = {name: values(f"{label} {name}", shape, amplitude) for name, shape in SHAPES.items()}
    return state | {name: values(f"{label} {name}", (3, 5), amplitude, dtype) for name, dtype in FLOATS.items()}


def pair():
    """A base and its fine-tune: every shape, a tied tensor, buffers, a fresh head, and one that only the base has."""
    base, change = model("base"), model("change", 0.02)
    tuned = {name: value if name == "frozen" else value + change[name] for name, value in base.items()}
    for state in (base, tuned):
        state["lm.weight"] = state["tok.embed.weight"]
    base |= {"steps": torch.tensor(3), "mask": torch.tensor([True, False, True])}
    tuned |= {"steps": torch.tensor(4), "mask": torch.tensor([True, True, False])}
    base["pooler.weight"] = values("pooler", (2, 2))
    tuned |= {"head.weight": values("head", (2, 6)), "head.bias": values("head bias", (2,))}
    return base, tuned


def bit_pairs():
    """A base and its fine-tune in every dtype there is, 0-d and empty ones among them; random bits, not values."""
    base, tuned = {}, {}
    for name in (*BITWISE, "float32", "float16", "bfloat16", "float64"):
        dtype = getattr(torch, name)
        for state, label in ((base, "old"), (tuned, "new")):
            bits = bytearray(stream(f"{label} {name}", 5 * dtype.itemsize))
            bits = bytearray(byte & 1 for byte in bits) if name == "bool" else bits
            state[name] = torch.frombuffer(bits, dtype=dtype)
            state[f"{name}.scalar"] = state[name][:1].clone().view(())
            state[f"{name}.empty"] = state[name][:0].clone().view(0, 2)
    base["odd"], tuned["odd"] = torch.tensor(ODD), torch.tensor(ODD[::-1])
    return base, tuned


def look(module, _):
    """What a calibration sees: every matrix is multiplied by the same inputs."""
    for name, weight in module.named_parameters():
        if weight.ndim == 2 and weight.numel():
            functional.linear(values(f"inputs {name}", (7, weight.shape[1])).to(weight.dtype), weight)


def compressed(method):
    base, tuned = pair()
    data = {"calibration": Calibration(module_of(tuned), [0], look)} if method.needs != "nothing" else {}
    return base, dtrain.compress(base, tuned, method, rules=RULES, **data)


#: Every stage, three of four a pipeline, as no single method has them.
STAGED = (
    Pipeline(Bernoulli(0.3, 1), Sign(8), transform=Transposed()), Pipeline(Stratified(0.7, 2), Uniform(4, 5), Zstd()),
    Pipeline(Groups(4, 1, 3), Affine(4, 16), Rans()), Pipeline(Units(2, 2, 0.5, 4), DeadZone(0.6, 7), Rans()),
    Pipeline(Indexed(), BFloat16(), Zstd()), Pipeline(All(), BFloat16(), transform=LowRank(2, 1)),
    Pipeline(All(), Mixed(16, True), Zstd(), BlockDct(4)),
)  # fmt: skip


def staged():
    """One tensor with a payload of every pipeline above."""
    base, payloads = {"w": values("staged", (6, 8))}, []
    for number, pipeline in enumerate(STAGED):
        given = {"positions": torch.tensor([0, 3, 4, 47])} if isinstance(pipeline.select, Indexed) else {}
        given |= {"widths": torch.arange(4) % 3} if isinstance(pipeline.quantise, Mixed) else {}
        payload = encode(pipeline, "w", values(f"payload {number}", (6, 8), 0.1), **given)
        payloads.append(replace(payload, scale=payload.scale * 0.75))
    record = Record("w", Role.ADD, torch.float32, (6, 8), digest(base["w"])[:DIGEST_BYTES], tuple(payloads))
    return base, dtrain.Delta(Content((record,), fingerprint([("w", digest(base["w"]))])))


def family():
    """A family's shared file, and a task's file that refers to it."""
    base, tuned = pair()
    other = {name: value + 0.25 * (value - base[name]) if value.is_floating_point() and name in base else value
             for name, value in tuned.items()}  # fmt: skip
    shared = dtrain.shared_base(base, [tuned, other], dtrain.Dare(keep=0.5), rules=RULES)
    task = dtrain.compress(base, tuned, dtrain.Dare(keep=0.25, seed=7), rules=RULES).content
    names = {record.name for record in shared.content.records if record.payloads and len(record.shape) == 2}
    reference = Payload(SHARED, torch.empty(0, dtype=torch.uint8), 0.5)
    records = tuple(replace(r, payloads=(reference, *r.payloads)) if r.name in names else r for r in task.records)
    content = replace(task, records=records, shared=file_digest(shared.content))
    return base, shared, dtrain.Delta(content, "task", shared.content)


def lora():
    """The factors of an adapter, compressed against nothing."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"], "bias": "none"}
    start = "base_model.model.up.lora_"
    factors = {f"{start}A.weight": values("lora a", (2, 6)), f"{start}B.weight": values("lora b", (4, 2))}
    delta = dtrain.compress(None, dtrain.lora_factors((factors, config)), dtrain.Dare(keep=0.5))
    return {name: torch.zeros_like(value) for name, value in factors.items()}, delta


def golden():
    """Name -> (base, delta) of every golden file."""
    files = {method.__name__.lower(): compressed(chosen(method)) for method in METHODS}
    base, tuned = bit_pairs()
    files["dtypes"] = (base, dtrain.compress(base, tuned, Lossless()))
    base, tuned = pair()
    files["dare_all_values"] = compressed(dtrain.Dare(keep=0.4, values="uniform4", mask="stratified"))
    rules = replace(RULES, vectors="sign", fresh="uniform4", embeddings=())
    files["codes"] = (base, dtrain.compress(base, tuned, dtrain.SeededSign(keep=0.25), rules=rules))
    files["whole_model"] = (base, dtrain.compress(base, tuned, dtrain.Dare(keep=0.5), rules=Rules(whole=("*",))))
    files["stages"], files["lora"] = staged(), lora()
    base, shared, task = family()
    return files | {"family": (base, shared), "task_of_family": (base, task)}


def chosen(method):
    """The method with arguments that suit matrices of a few dozen elements."""
    arguments = {
        "Dare": {"keep": 0.25}, "DareX": {"keep": 0.5, "q": "keep"}, "Structured": {"keep": 0.5, "q": 0.7},
        "Magnitude": {"keep": 0.2}, "Wanda": {"keep": 0.3}, "DeltaDQ": {"alpha": 2, "bits": 4, "parts": 2},
        "DeltaDCT": {"patch": 4}, "ImPart": {"keep": 0.5}, "UltraDelta": {"keep": 0.5}, "ComPEFT": {"keep": 0.2},
        "SeededSign": {"keep": 0.25}, "EoRA": {"rank": 2}, "Dbms": {"lam": 0.7, "eta": 1.0},
    }  # fmt: skip
    given = arguments.get(method.__name__, {})
    if method is dtrain.Dbms:
        return dtrain.Dbms(dtrain.SeededSign(keep=0.5), **given)
    return method(**given)


def bytes_of(delta):
    return b"".join(pack_file(delta.content))


def plain(state):
    """A state dict as JSON holds it: name -> [dtype, shape, bytes in hex], or the name of the tensor it is tied to."""
    first = {id(tensor): name for name, tensor in sorted(state.items(), reverse=True)}
    table = {name: [str(t.dtype).removeprefix("torch."), list(t.shape), raw(t).hex()] for name, t in state.items()}
    return {name: entry if first[id(state[name])] == name else first[id(state[name])] for name, entry in table.items()}


def tensors(state):
    """The state dict of what `plain` returned."""
    out, ties = {}, {name: entry for name, entry in state.items() if isinstance(entry, str)}
    for name, (dtype, shape, data) in ((name, entry) for name, entry in state.items() if name not in ties):
        kind = getattr(torch, dtype)
        empty = torch.empty(0, dtype=kind)
        out[name] = (torch.frombuffer(bytearray.fromhex(data), dtype=kind) if data else empty).view(shape)
    return out | {name: out[other] for name, other in ties.items()}


def write_golden(folder=GOLDEN):
    folder.mkdir(parents=True, exist_ok=True)
    bases, expected = {}, {}
    for name, (base, delta) in golden().items():
        state = plain(base)
        label = next((other for other, known in bases.items() if known == state), name)
        bases[label] = state
        (folder / f"{name}.safetensors").write_bytes(bytes_of(delta))
        tuned = {tensor: digest(value).hex()[:16] for tensor, value in sorted(delta.state_dict(base).items())}
        expected[name] = {"base": label, "tensors": tuned}
    (folder / "bases.json").write_text(json.dumps(bases, ensure_ascii=False, indent=0))
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0))


def refusal(name, data):
    """The sentence that a damaged file gets: when it is loaded, or when it is put on a base of zeros."""
    try:
        delta = dtrain.Delta(dtrain.artifact.unpack_file(bytearray(data), name))
        delta.origin = name
        delta.report()
        delta.state_dict({"w": torch.zeros(2)})
    except ArtifactError as error:
        return str(error)
    except BaseMismatchError:  # it was read
        return None
    return None


def write_damaged(folder=HERE):
    for group, files in (("critical", damaged.critical()), ("non_critical", damaged.non_critical())):
        (folder / group).mkdir(parents=True, exist_ok=True)
        expected = {}
        for title, data in files.items():
            name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") + ".safetensors"
            (folder / group / name).write_bytes(data)
            expected[name] = refusal(name, data)
        (folder / group / "expected.json").write_text(json.dumps(expected, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    write_damaged()
    if "--damaged" not in sys.argv:
        write_golden()
