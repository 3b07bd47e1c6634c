//! Captions, tags and scores of pictures by models that others have trained. Links no tensor
//! library of its own.
//!
//! A source of pictures or a packed data set goes in, a table of annotations comes out
//! (`rectiflow_data::annotation`), which `rectiflow prep --annotations` merges. Work that takes
//! days is resumed: an answer is on disk before the next is asked for.
//!
//! The folders, from top to bottom; each one uses only folders below it:
//!
//! | folder | holds |
//! |---|---|
//! | `caption` | captions from served models: the client, its checks, the probe, a run |
//! | `loopback` | a server of chat completions on this machine, for tests and measurements |
//! | `tag` | the names of a tagger's outputs, and which of them are a picture's tags |
//! | `score` | a head's numbers to scores, scores of a table, ranks over a whole set |
//! | `pass` | each picture of a set once through a model, a row for each |
//! | `pictures` | what is annotated: pictures of a source, or of a packed data set |
//! | `table` | the answers: a journal, numbered parts, one table at the end |
//! | `onnx` | models in ONNX files: found, opened and run; pictures to their inputs |
//! | `error` | errors by meaning |

pub mod caption;
pub mod error;
pub mod loopback;
pub mod onnx;
pub mod pass;
pub mod pictures;
pub mod score;
pub mod table;
pub mod tag;
