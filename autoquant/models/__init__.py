"""From MODEL, as a user names it, to a module: full size on the meta device, or small with real weights.

The only package that imports transformers, and only when one of its functions is called. Nothing here knows an
architecture: sizes are reduced by what their configuration fields are called and by how their values relate.
"""
