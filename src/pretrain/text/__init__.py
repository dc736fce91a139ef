"""Documents: where raw text comes from. Nothing heavier than the standard library is imported before it is needed.

    files, folders, patterns, URLs ──find_pieces──> Piece, Piece, ... ──read_piece──> Document, Document, ...

``files`` finds the files, ``opening`` opens them (remote and compressed ones too), ``formats`` reads the types of file,
``pieces`` divides files into parts that can be read independently. ``embedded`` is the corpus that comes with the
installation, ``problems`` says what was wrong with a text, ``split`` sets the validation text apart, ``catalogue``
lists public texts and ``download`` fetches them.
"""

from pretrain.text.embedded import embedded_documents, embedded_name
from pretrain.text.formats import Document
from pretrain.text.pieces import Piece, find_pieces, read_documents, read_piece
from pretrain.text.problems import PROBLEMS, ReadStats, problem_lines, refuse_broken
