"""FAMILIES: a name -> the model family that can be imported and served. One file a family."""

from __future__ import annotations

from models.families import chatglm, chatglm2, chatglm3, codegeex2, embedding, glm4, hf, reranker
from models.family import Family, LoadedEncoder, LoadedNetwork

AnyFamily = Family[LoadedNetwork] | Family[LoadedEncoder]

FAMILIES: dict[str, AnyFamily] = {
    "chatglm": chatglm.FAMILY,
    "chatglm2": chatglm2.FAMILY,
    "chatglm3": chatglm3.FAMILY,
    "codegeex2": codegeex2.FAMILY,
    "glm4": glm4.FAMILY,
    "hf": hf.FAMILY,
    "embedding": embedding.FAMILY,
    "reranker": reranker.FAMILY,
}
