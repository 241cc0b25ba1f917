"""``limbeck serve``: OpenAI's completions and chat completions over a GGUF file, a model folder or a LoRA generator's run.

``questions`` checks what is asked, ``app`` answers it, ``replies`` knows the forms of the answers; ``llama`` and ``transformers``
write the text, piece by piece, behind the one face in ``backend``.
"""
