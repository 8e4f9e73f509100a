# SPDX-License-Identifier: Apache-2.0
"""From a request (tokens and everything else that changes its KV) to the digests of its blocks.

What may change the KV of a block besides its tokens and those before it, and where it enters:

=====================  ==========================================================================
cache salt             seeds and root of the chain, hence every block (``RequestKeys.salt``)
LoRA adapter           the same, by name and path (``lora_name``, ``lora_path``)
multimodal inputs      the blocks that an item touches: its identifier and its offset in the block
prompt embeddings      the blocks that have rows of them: SHA-256 of these rows
KV-cache group         mixed into the digest where it is stored: ``digest_for_group``
key epoch              mixed in likewise; raising it makes everything older unreachable
model, dtype, layout   not here: the fingerprint of the segment keeps these apart
=====================  ==========================================================================

The keys of multimodal inputs and prompt embeddings, and the blocks that get them, are those of
vLLM's ``generate_block_hash_extra_keys`` (vllm/v1/core/kv_cache_utils.py, 0.32).

Two sources of digests:

- block hashes that the engine computed, if ``engine_hashes_usable`` says so: the first 16 bytes of
  each, read where they are (``kvbm._fast.keys.Keys``);
- ``token_chain``: our own, either two lanes of XXH3 or, where tenants do not trust each other,
  keyed BLAKE2b.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvbm._fast.hashing import (
    DigestChain,
    digest_for_epoch,
    digest_for_group,
    xxh3_64,
)
from kvbm._fast.token_chain import TokenBlock, TokenChain
from kvbm._fast.tokens import pack_tokens

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "DIGEST_BYTES",
    "ENGINE_HASH_ALGORITHMS",
    "NO_KEYS",
    "ROUTER_SEED",
    "DigestChain",
    "MultimodalItem",
    "RequestKeys",
    "TokenBlock",
    "TokenChain",
    "digest_for_epoch",
    "digest_for_group",
    "engine_hashes_problem",
    "engine_hashes_usable",
    "extra_keys",
    "identity_mix",
    "pack_tokens",
    "salt_hash",
    "salt_payload",
    "token_chain",
    "xxh3_64",
]

DIGEST_BYTES = 16

ROUTER_SEED = 1337
"""Salt hash under which the sequence hashes of a chain are the block keys of Dynamo's KV router."""

ENGINE_HASH_ALGORITHMS = ("sha256", "sha256_cbor")
"""vLLM's ``prefix_caching_hash_algo`` values that are collision resistant."""

ExtraKey: TypeAlias = tuple[Literal["mm"], str, int] | tuple[Literal["prompt_embeds"], bytes]

_IDENTITY_DOMAIN = b"kvbm-identity-1"
_EXTRA_DOMAIN = b"kvbm-extra-1"
_DIGEST_DOMAIN = b"kvbm-digest-1"


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """One multimodal input of a request and the placeholder tokens that stand for it.

    Attributes
    ----------
    identifier
        Hash or name of the content, equal exactly for equal content.
    offset, length
        The placeholder tokens: ``offset`` to before ``offset + length`` of the request.
    """

    identifier: str
    offset: int
    length: int

    def blocks(self, block_size: int) -> range:
        """Return the indices of the blocks that contain part of the placeholder."""
        last = self.offset + max(0, self.length - 1)
        return range(self.offset // block_size, last // block_size + 1)


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """What changes the KV of a request besides its tokens.

    Attributes
    ----------
    salt
        The request's cache salt; None if it has none.
    lora_name, lora_path
        The LoRA adapter; None without one. The path keeps a name that is pointed at another
        adapter from finding the KV of the old one.
    multimodal
        Its multimodal inputs, in order of offset.
    prompt_embeds
        C-contiguous buffer whose first axis is the tokens, or None. A torch tensor of any dtype:
        ``t.detach().cpu().contiguous().view(torch.uint8).numpy()``.
    """

    salt: str | None = None
    lora_name: str | None = None
    lora_path: str | None = None
    multimodal: tuple[MultimodalItem, ...] = ()
    prompt_embeds: Buffer | None = None


NO_KEYS = RequestKeys()
"""The keys of a plain request: its tokens alone decide."""


def salt_payload(salt: str | None = None, lora_name: str | None = None) -> bytes:
    """Return KVBM 1.x's salt payload: compact JSON of the fields that are present, in this order.

    Examples
    --------
    >>> salt_payload(), salt_payload("abc"), salt_payload(None, "l1")
    (b'{}', b'{"salt":"abc"}', b'{"lora_name":"l1"}')
    """
    return _compact_json({"salt": salt, "lora_name": lora_name})


def salt_hash(salt: str | None = None, lora_name: str | None = None) -> int:
    """Return KVBM 1.x's salt hash, the seed of block and sequence hashes: unsigned 64 bits."""
    return xxh3_64(salt_payload(salt, lora_name), 0)


def token_chain(
    block_size: int, keys: RequestKeys = NO_KEYS, *, key: bytes | None = None
) -> TokenChain:
    """Return an empty chain for the tokens of a request.

    Parameters
    ----------
    block_size
        Tokens a block.
    keys
        What else changes the KV of the request.
    key
        None: digests are two XXH3 lanes, fast and good against chance (``kvbm._fast.token_chain``
        has the estimate). Bytes, 16 to 64, kept secret: digests are BLAKE2b keyed with them, about
        1 us a block, for tenants that do not trust each other and an engine without SHA-256
        hashes. Processes share blocks only if they use the same key, or all none.

    Raises
    ------
    ValueError
        If ``block_size`` or the length of ``key`` is not allowed.
    """
    digest_function = None
    if key is not None:
        if not 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
            raise ValueError(
                f"key has {len(key)} bytes: 16 to {hashlib.blake2b.MAX_KEY_SIZE} are allowed"
            )
        digest_function = partial(_keyed_digest, key)
    return TokenChain(
        block_size,
        salt_hash(keys.salt, keys.lora_name),
        identity=_identity(keys, 32),
        extra={i: _packed_extra_keys(k) for i, k in extra_keys(keys, block_size).items()},
        digest_function=digest_function,
    )


def extra_keys(keys: RequestKeys, block_size: int) -> dict[int, tuple[ExtraKey, ...]]:
    """Return what enters the hashes of blocks besides their tokens, for the blocks that have any.

    Returns
    -------
    dict
        Block index -> keys: ``("mm", identifier, offset)`` for each multimodal item that touches
        the block, where ``offset`` is relative to the start of the block (negative if the item
        began before it), so that equal placeholders around an item at another place differ; then
        ``("prompt_embeds", SHA-256 of the block's rows)`` if it has rows of them.
    """
    blocks: dict[int, list[ExtraKey]] = {}
    for item in keys.multimodal:
        for index in item.blocks(block_size):
            offset = item.offset - index * block_size
            blocks.setdefault(index, []).append(("mm", item.identifier, offset))
    if keys.prompt_embeds is not None:
        rows, row_bytes, data = _embedding_rows(keys.prompt_embeds)
        block_bytes = row_bytes * block_size
        for index in range(-(-rows // block_size)):
            digest = hashlib.sha256(data[index * block_bytes : (index + 1) * block_bytes]).digest()
            blocks.setdefault(index, []).append(("prompt_embeds", digest))
    return {index: tuple(block) for index, block in blocks.items()}


def engine_hashes_problem(
    hash_algo: str, env: Mapping[str, str], default_seed: str | None = None, *, shared: bool = True
) -> str | None:
    """Return why vLLM's block hashes cannot serve as digests, or None if they can.

    A digest must be collision resistant, since a match is trusted, and equal in every process that
    shares the cache. What vLLM 0.20 to 0.33 offers (``cache_config.prefix_caching_hash_algo``, see
    vllm/utils/hashing.py and ``init_none_hash`` in vllm/v1/core/kv_cache_utils.py):

    ============================  ================================================================
    ``sha256`` (its default)      SHA-256 of (parent hash, tokens, extra keys), pickled: qualifies
    ``sha256_cbor``               the same in canonical CBOR: qualifies
    ``xxhash``, ``xxhash_cbor``   XXH3-128, not collision resistant: does not
    anything else                 does not (``builtin`` of old versions was Python's ``hash()``)
    ============================  ================================================================

    The parent hash of the first block, NONE_HASH, decides whether two processes agree:

    - it is the hash of the environment variable PYTHONHASHSEED if that is set, even to "random" or
      to nothing, in all versions: reproducible. Processes with different values share nothing.
    - else, 0.29 and later: the hash of a fixed string for both ``sha256`` variants: reproducible.
      The module then has ``DEFAULT_NONE_HASH_SEED``.
    - else, 0.28 and before: 32 random bytes a process: not reproducible, though sound inside it.

    ``sha256`` pickles with the highest protocol, so it depends on Python as well: another pickle
    protocol gives other hashes, which costs misses and cannot give a wrong block.

    Parameters
    ----------
    hash_algo
        Name of the algorithm, as configured.
    env
        Environment of the engine, ``os.environ``.
    default_seed
        ``getattr(vllm.v1.core.kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None)``; None is taken for
        a version that has no fixed seed.
    shared
        Whether the cache is shared with another process or outlives this one. If not, random
        hashes are as good as reproducible ones.
    """
    if hash_algo not in ENGINE_HASH_ALGORITHMS:
        allowed = " or ".join(ENGINE_HASH_ALGORITHMS)
        return (
            f"prefix_caching_hash_algo={hash_algo!r} is not collision resistant: {allowed} would be"
        )
    if shared and default_seed is None and "PYTHONHASHSEED" not in env:
        return (
            "this version of the engine seeds its block hashes at random in each process, so that "
            "they cannot be shared: set PYTHONHASHSEED to the same value for every process"
        )
    return None


def engine_hashes_usable(
    hash_algo: str, env: Mapping[str, str], default_seed: str | None = None, *, shared: bool = True
) -> bool:
    """Return whether vLLM's block hashes can serve as digests; see ``engine_hashes_problem``."""
    return engine_hashes_problem(hash_algo, env, default_seed, shared=shared) is None


def identity_mix(keys: RequestKeys) -> bytes:
    """Return 16 bytes to be exclusive-ored with the engine's digests; zeros without salt and LoRA.

    vLLM 0.30 and before put the bare LoRA name and the bare cache salt into the first block's hash,
    so that a request with salt "x" meets one with adapter "x" there, and left out the adapter's
    path. Mixing in salt, name and path keeps these apart; from 0.31 on the engine does so itself.
    """
    if keys.salt is None and keys.lora_name is None and keys.lora_path is None:
        return bytes(DIGEST_BYTES)
    return _identity(keys, DIGEST_BYTES)


def _identity(keys: RequestKeys, size: int) -> bytes:
    """Return a hash of what holds for the whole request; cryptographic: users choose salts."""
    payload = _compact_json(
        {"salt": keys.salt, "lora_name": keys.lora_name, "lora_path": keys.lora_path}
    )
    return hashlib.blake2b(payload, digest_size=size, person=_IDENTITY_DOMAIN).digest()


def _packed_extra_keys(keys: tuple[ExtraKey, ...]) -> bytes:
    """Return 32 bytes that stand for the keys of one block.

    Each key is written as its kind, its numbers and its length before its bytes, so that no two
    lists of keys are written alike.
    """
    packed = hashlib.blake2b(digest_size=32, person=_EXTRA_DOMAIN)
    for key in keys:
        if key[0] == "mm":
            name = key[1].encode("utf-8", "surrogatepass")
            packed.update(struct.pack("<BqQ", 1, key[2], len(name)) + name)
        else:
            packed.update(struct.pack("<BQ", 2, len(key[1])) + key[1])
    return packed.digest()


def _embedding_rows(embeds: Buffer) -> tuple[int, int, memoryview]:
    """Return the number of rows, the bytes of one, and all bytes."""
    view = memoryview(embeds)
    if view.ndim < 1 or not view.c_contiguous:
        raise ValueError("prompt_embeds is not a C-contiguous buffer with tokens as its first axis")
    rows = view.shape[0] if view.shape else 0
    if view.nbytes == 0:  # memoryview cannot cast these
        return rows, 0, memoryview(b"")
    return rows, view.nbytes // rows, view.cast("B")


def _keyed_digest(key: bytes, message: bytes) -> bytes:
    """Return the digest of one block: BLAKE2b keyed with ``key``, RFC 7693."""
    return hashlib.blake2b(
        message, digest_size=DIGEST_BYTES, key=key, person=_DIGEST_DOMAIN
    ).digest()


def _compact_json(fields: Mapping[str, str | None]) -> bytes:
    """Return the fields that are not None as compact JSON in UTF-8, as serde_json writes it.

    A lone surrogate (JSON can express one) is written as such instead of failing the request.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    text = json.dumps(present, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")
