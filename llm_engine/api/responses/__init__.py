"""Responses, whichever dialect asks for them: asked of an engine, kept, told, cancelled.

Engines are asked statelessly, with all that came before; what came before is the store's. A
response answers while its client waits (`operations`), or in the background (`worker`), where any
gateway may do the work, and another one goes on when it dies.
"""
