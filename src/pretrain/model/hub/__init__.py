"""What an export of a model that transformers has no counterpart for takes along: its own two Python files.

``configuration_pretrain.py`` goes as it is. Into ``modeling_pretrain.py`` the export writes all it uses of pretrain
(``report/standalone.py``), so there is one implementation of the Transformer, and the export needs only torch and
transformers.
"""
