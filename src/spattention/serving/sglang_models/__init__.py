"""The model classes that SGLang builds for band models.

SGLang's model registry takes a package and imports all modules in it. Tools that set
`SGLANG_EXTERNAL_MODEL_PACKAGE` may name this one.
"""
