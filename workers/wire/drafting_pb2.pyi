from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Up(_message.Message):
    __slots__ = ("hello", "turns", "close")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    turns: Turns
    close: Close
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., turns: _Optional[_Union[Turns, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("welcome", "drafts", "status")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    drafts: Drafts
    status: Status
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., drafts: _Optional[_Union[Drafts, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "session", "layout")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session: str
    layout: Layout
    def __init__(self, protocol: _Optional[int] = ..., session: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "worker_id", "layout")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker_id: str
    layout: Layout
    def __init__(self, protocol: _Optional[int] = ..., worker_id: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("target", "drafter", "dtype", "feature_width", "block_size", "vocab_size")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    target: str
    drafter: str
    dtype: str
    feature_width: int
    block_size: int
    vocab_size: int
    def __init__(self, target: _Optional[str] = ..., drafter: _Optional[str] = ..., dtype: _Optional[str] = ..., feature_width: _Optional[int] = ..., block_size: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "crc32")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    crc32: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class Turns(_message.Message):
    __slots__ = ("seq", "turns")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    def __init__(self, seq: _Optional[int] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("id", "base_len", "tokens", "feature_start", "features", "max_draft", "max_nodes", "temperature", "rule", "noise_seed", "cache_salt")
    ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_START_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    NOISE_SEED_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    id: str
    base_len: int
    tokens: Tensor
    feature_start: int
    features: Tensor
    max_draft: int
    max_nodes: int
    temperature: float
    rule: str
    noise_seed: int
    cache_salt: str
    def __init__(self, id: _Optional[str] = ..., base_len: _Optional[int] = ..., tokens: _Optional[_Union[Tensor, _Mapping]] = ..., feature_start: _Optional[int] = ..., features: _Optional[_Union[Tensor, _Mapping]] = ..., max_draft: _Optional[int] = ..., max_nodes: _Optional[int] = ..., temperature: _Optional[float] = ..., rule: _Optional[str] = ..., noise_seed: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Drafts(_message.Message):
    __slots__ = ("seq", "trees", "held", "seconds")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TREES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    trees: _containers.RepeatedCompositeFieldContainer[Tree]
    held: _containers.RepeatedCompositeFieldContainer[Held]
    seconds: float
    def __init__(self, seq: _Optional[int] = ..., trees: _Optional[_Iterable[_Union[Tree, _Mapping]]] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., seconds: _Optional[float] = ...) -> None: ...

class Tree(_message.Message):
    __slots__ = ("id", "base_len", "tokens", "parents", "confidence", "margin", "law_ids", "law_probs")
    ID_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    LAW_IDS_FIELD_NUMBER: _ClassVar[int]
    LAW_PROBS_FIELD_NUMBER: _ClassVar[int]
    id: str
    base_len: int
    tokens: Tensor
    parents: Tensor
    confidence: Tensor
    margin: Tensor
    law_ids: Tensor
    law_probs: Tensor
    def __init__(self, id: _Optional[str] = ..., base_len: _Optional[int] = ..., tokens: _Optional[_Union[Tensor, _Mapping]] = ..., parents: _Optional[_Union[Tensor, _Mapping]] = ..., confidence: _Optional[_Union[Tensor, _Mapping]] = ..., margin: _Optional[_Union[Tensor, _Mapping]] = ..., law_ids: _Optional[_Union[Tensor, _Mapping]] = ..., law_probs: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("id", "known", "have", "is_full")
    ID_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    IS_FULL_FIELD_NUMBER: _ClassVar[int]
    id: str
    known: int
    have: int
    is_full: bool
    def __init__(self, id: _Optional[str] = ..., known: _Optional[int] = ..., have: _Optional[int] = ..., is_full: _Optional[bool] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("draining",)
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    def __init__(self, draining: _Optional[bool] = ...) -> None: ...
