from dspark.workers.wire import drafting_pb2 as _drafting_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Wanted(_message.Message):
    __slots__ = ("protocol", "layout", "hashes", "first")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    layout: Layout
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    first: int
    def __init__(self, protocol: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., hashes: _Optional[_Iterable[bytes]] = ..., first: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("identity", "block_size", "parts")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    identity: str
    block_size: int
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, identity: _Optional[str] = ..., block_size: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("first", "count", "tensors")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    tensors: _containers.RepeatedCompositeFieldContainer[_drafting_pb2.Tensor]
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[_drafting_pb2.Tensor, _Mapping]]] = ...) -> None: ...

class FromTaker(_message.Message):
    __slots__ = ("meet", "prefix", "go")
    MEET_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    GO_FIELD_NUMBER: _ClassVar[int]
    meet: Meet
    prefix: Prefix
    go: Go
    def __init__(self, meet: _Optional[_Union[Meet, _Mapping]] = ..., prefix: _Optional[_Union[Prefix, _Mapping]] = ..., go: _Optional[_Union[Go, _Mapping]] = ...) -> None: ...

class FromGiver(_message.Message):
    __slots__ = ("met", "head")
    MET_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    met: Met
    head: Head
    def __init__(self, met: _Optional[_Union[Met, _Mapping]] = ..., head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class Meet(_message.Message):
    __slots__ = ("protocol", "layout", "backend", "store")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    layout: Layout
    backend: str
    store: str
    def __init__(self, protocol: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., backend: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

class Met(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("hashes", "first")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    first: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., first: _Optional[int] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("first", "count", "tensors")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHead]
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ...) -> None: ...

class TensorHead(_message.Message):
    __slots__ = ("dtype", "shape", "length", "checksum")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    length: int
    checksum: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Go(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
