//! Text to token ids, exactly as in Hugging Face's fast CLIP tokenizer, cut into chunks of 75.
//!
//! SDXL's two encoders share one vocabulary: 256 byte letters, the same letters at the end of a
//! word, 48,894 merges and two special tokens. All of it follows from the merges, which are
//! embedded (`assets/clip/`), so that nothing is downloaded. Each chunk is BOS + up to 75 tokens +
//! EOS, padded to 77; CLIP-L pads with EOS (49407), bigG with 0. Text beyond three chunks is
//! dropped.
//!
//! The encoders differ only in their padding. Hugging Face's `tokenizer_2` declares the padding
//! token "!" special, and therefore also reads every "!" of a text as padding (id 0); OpenCLIP,
//! which bigG was trained with, and ComfyUI read it as a word (256). This tokenizer does the same,
//! and [`tokenizer_files`] configures exports so that transformers does too. HTML entities are left
//! as they are: preparation unescapes them.

use std::{fmt, io::Read, sync::LazyLock};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, SplitDelimiterBehavior,
    models::bpe::BPE,
    normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
};

use crate::text::token_cache::TokenCache;

/// Tokens of text in a chunk.
pub const CHUNK_TOKENS: usize = 75;
/// Ids in a chunk: BOS, up to 75 tokens, EOS and padding.
pub const CHUNK_LEN: usize = 77;
/// Largest number of chunks of a text; the rest is dropped.
pub const MAX_CHUNKS: usize = 3;
/// First id of each chunk.
pub const BOS: i64 = 49406;
/// Id after a chunk's last token.
pub const EOS: i64 = 49407;

const BOS_TEXT: &str = "<|startoftext|>";
const EOS_TEXT: &str = "<|endoftext|>";
/// Id of "," at the end of a word.
const COMMA: u32 = 267;
/// Number of tokens that A1111's user interface looks back for a comma, by default.
const COMMA_BACKTRACK: usize = 20;
/// Characters that are white space in every case. The tokenizer decides about all others.
const SPACES: [char; 4] = [' ', '\t', '\r', '\n'];
/// Matches the words that CLIP's byte-pair encoding works on.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The merges as text, one per line, most frequent first.
static MERGES: LazyLock<String> = LazyLock::new(|| {
    let bytes: &[u8] = include_bytes!("../../../../assets/clip/merges.txt.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(bytes)
        .read_to_string(&mut text)
        .expect("the embedded merges are gzip of UTF-8");
    text
});

/// One of SDXL's text encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clip {
    /// CLIP ViT-L, `tokenizer` and `text_encoder` of a model folder.
    L,
    /// OpenCLIP ViT-bigG, `tokenizer_2` and `text_encoder_2`.
    G,
}

impl Clip {
    /// The id that fills a chunk after its EOS.
    pub const fn padding(self) -> i64 {
        match self {
            Self::L => EOS,
            Self::G => 0,
        }
    }

    /// The token of the id that fills a chunk.
    const fn padding_text(self) -> &'static str {
        match self {
            Self::L => EOS_TEXT,
            Self::G => "!",
        }
    }
}

/// Where a long text is cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cut {
    /// Every 75 tokens, as ComfyUI does.
    #[default]
    Plain,
    /// After the last comma among the last 20 tokens of a full chunk, if there is one, as A1111's
    /// user interface does.
    Comma,
}

/// The chunks of a text for both encoders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenChunks {
    /// Ids for CLIP-L, 1 to 3 chunks.
    pub clip_l: Vec<[i64; CHUNK_LEN]>,
    /// Ids for bigG, in the same number of chunks.
    pub clip_g: Vec<[i64; CHUNK_LEN]>,
}

/// CLIP's tokenizer, usable from many threads. Building it takes about 0.1 s; [`Tokenizer::shared`]
/// does so once.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    cache: TokenCache,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokenizer {
    /// Builds the tokenizer from the embedded merges.
    pub fn new() -> Self {
        let mut inner = tokenizers::Tokenizer::new(byte_pairs());
        inner
            .with_normalizer(Some(normalizer()))
            .expect("special tokens are added after the normalizer");
        inner.with_pre_tokenizer(Some(pre_tokenizer()));
        let special = [BOS_TEXT, EOS_TEXT].map(|text| AddedToken::from(text, true));
        inner
            .add_special_tokens(special)
            .expect("both are in the vocabulary");
        Self {
            inner,
            cache: TokenCache::default(),
        }
    }

    /// The process's tokenizer, built at the first call.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::new);
        &SHARED
    }

    /// The ids of a text, without BOS and EOS, uncut.
    pub fn ids(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (_, word) in words(text) {
            self.append(word, &mut ids);
        }
        ids
    }

    /// Appends the ids of a word, as [`words`] returns them.
    pub(crate) fn append(&self, word: &str, ids: &mut Vec<u32>) {
        self.cache.append(word, ids, |word| self.encode(word));
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        let encoding = self.inner.encode_fast(text, false);
        encoding
            .expect("byte-level encoding has an id for every byte")
            .get_ids()
            .to_vec()
    }

    /// The chunks of a text cut every 75 tokens; the empty text has one.
    pub fn chunks(&self, text: &str) -> TokenChunks {
        self.chunks_cut(text, Cut::Plain)
    }

    /// The chunks of a text, cut as `cut` says; the empty text has one.
    pub fn chunks_cut(&self, text: &str, cut: Cut) -> TokenChunks {
        let ids = self.ids(text);
        let pieces = pieces(&ids, cut);
        TokenChunks {
            clip_l: padded(&pieces, Clip::L),
            clip_g: padded(&pieces, Clip::G),
        }
    }

    /// The number of chunks that [`Tokenizer::chunks_cut`] would return, 1 to 3.
    pub fn num_chunks(&self, text: &str, cut: Cut) -> usize {
        pieces(&self.ids(text), cut).len()
    }
}

/// The words of a text, each with the byte it begins at. Nothing spans a space: no match of
/// [`WORDS`], no composed letter, no special token.
pub(crate) fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let start = text.as_ptr() as usize;
    let words = text.split(SPACES).filter(|word| !word.is_empty());
    words.map(move |word| (word.as_ptr() as usize - start, word))
}

/// The chunk of a text without tokens: BOS, EOS and padding.
pub fn empty_chunk(clip: Clip) -> [i64; CHUNK_LEN] {
    chunk(&[], clip)
}

fn byte_pairs() -> BPE {
    let ids = vocabulary().into_iter().zip(0..).collect();
    let mut merges = Vec::new();
    for (first, second) in MERGES.lines().map(merge) {
        merges.push((first.to_owned(), second.to_owned()));
    }
    BPE::builder()
        .vocab_and_merges::<tokenizers::models::bpe::Vocab>(ids, merges)
        .unk_token(EOS_TEXT.to_owned())
        .end_of_word_suffix("</w>".to_owned())
        .build()
        .expect("the embedded merges name tokens of the vocabulary that they make")
}

fn normalizer() -> Normalizers {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ");
    let spaces = spaces.expect("a valid expression");
    Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])
}

fn pre_tokenizer() -> PreTokenizers {
    let words = SplitPattern::Regex(WORDS.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Removed, true);
    let split = split.expect("a valid expression");
    let bytes = ByteLevel::new(false, true, true);
    PreTokenizers::new(vec![split.into(), bytes.into()])
}

fn padded(pieces: &[&[u32]], clip: Clip) -> Vec<[i64; CHUNK_LEN]> {
    pieces.iter().map(|piece| chunk(piece, clip)).collect()
}

fn chunk(piece: &[u32], clip: Clip) -> [i64; CHUNK_LEN] {
    let mut ids = [clip.padding(); CHUNK_LEN];
    ids[0] = BOS;
    for (id, &token) in ids[1..].iter_mut().zip(piece) {
        *id = i64::from(token);
    }
    ids[1 + piece.len()] = EOS;
    ids
}

/// Cuts ids into 1 to 3 pieces of at most 75.
pub(crate) fn pieces(ids: &[u32], cut: Cut) -> Vec<&[u32]> {
    let mut pieces = Vec::with_capacity(1);
    let mut rest = ids;
    while pieces.len() < MAX_CHUNKS && (!rest.is_empty() || pieces.is_empty()) {
        let (piece, after) = rest.split_at(piece_len(rest, cut));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Length of the first piece of `ids`. A1111 moves the text after a comma to the next chunk only if
/// the token that would begin that chunk is not a comma itself.
fn piece_len(ids: &[u32], cut: Cut) -> usize {
    if ids.len() <= CHUNK_TOKENS || cut == Cut::Plain || ids[CHUNK_TOKENS] == COMMA {
        return ids.len().min(CHUNK_TOKENS);
    }
    let from = CHUNK_TOKENS - COMMA_BACKTRACK;
    let comma = ids[from..CHUNK_TOKENS].iter().rposition(|&id| id == COMMA);
    comma.map_or(CHUNK_TOKENS, |comma| from + comma + 1)
}

fn merge(line: &str) -> (&str, &str) {
    line.split_once(' ')
        .expect("each line of the embedded merges is two tokens")
}

/// All tokens in the order of their ids.
fn vocabulary() -> Vec<String> {
    let letters = byte_letters();
    let mut tokens: Vec<String> = letters.iter().map(char::to_string).collect();
    for letter in letters {
        tokens.push(format!("{letter}</w>"));
    }
    for (first, second) in MERGES.lines().map(merge) {
        tokens.push(format!("{first}{second}"));
    }
    tokens.extend([BOS_TEXT, EOS_TEXT].map(str::to_owned));
    tokens
}

/// GPT-2's printable letters for the 256 bytes: printable Latin-1 first, then 256 and up for the
/// others.
fn byte_letters() -> Vec<char> {
    let mut letters: Vec<char> = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ').collect();
    let num_others = 256 - letters.len() as u32;
    for code in 256..256 + num_others {
        letters.push(char::from_u32(code).expect("below the surrogates"));
    }
    letters
}

/// A hash of everything that the ids depend on. It is part of a run's order, since chunk counts
/// shape micro-batches.
pub fn fingerprint() -> String {
    let mut hasher = blake3::Hasher::new();
    // Raise the number when anything but the merges and `WORDS` changes the ids.
    hasher
        .update(b"rectiflow clip tokenizer 1\n")
        .update(MERGES.as_bytes())
        .update(WORDS.as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// The files (name, bytes) of a tokenizer folder that `CLIPTokenizer.from_pretrained` opens without
/// a network.
pub fn tokenizer_files(which: Clip) -> Vec<(&'static str, Vec<u8>)> {
    let mut vocab = serde_json::Map::new();
    for (id, token) in (0u32..).zip(vocabulary()) {
        vocab.insert(token, id.into());
    }
    let merges = format!("#version: 0.2\n{}", *MERGES);
    vec![
        ("vocab.json", Value::Object(vocab).to_string().into_bytes()),
        ("merges.txt", merges.into_bytes()),
        ("tokenizer_config.json", pretty(&tokenizer_config(which))),
        (
            "special_tokens_map.json",
            pretty(&special_tokens_map(which)),
        ),
    ]
}

fn tokenizer_config(which: Clip) -> Value {
    let mut config = json!({
        "add_prefix_space": false,
        "bos_token": special_token(BOS_TEXT),
        "clean_up_tokenization_spaces": true,
        "do_lower_case": true,
        "eos_token": special_token(EOS_TEXT),
        "errors": "replace",
        "model_max_length": CHUNK_LEN,
        "pad_token": which.padding_text(),
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": special_token(EOS_TEXT),
    });
    if which == Clip::G {
        // Without it transformers would read every "!" of a prompt as padding.
        config["split_special_tokens"] = true.into();
    }
    config
}

fn special_tokens_map(which: Clip) -> Value {
    json!({
        "bos_token": special_token(BOS_TEXT),
        "eos_token": special_token(EOS_TEXT),
        "pad_token": which.padding_text(),
        "unk_token": special_token(EOS_TEXT),
    })
}

fn special_token(content: &str) -> Value {
    json!({
        "content": content,
        "lstrip": false,
        "normalized": false,
        "rstrip": false,
        "single_word": false,
    })
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Rng};

    #[test]
    fn merges_are_those_of_the_source() {
        assert_eq!(MERGES.lines().count(), 48_894);
        assert_eq!(
            (MERGES.lines().next(), MERGES.lines().last()),
            (Some("i n"), Some("jeky ll</w>"))
        );
        let tokens = vocabulary();
        assert_eq!(tokens.len(), 49_408);
        assert_eq!(
            (tokens[0].as_str(), tokens[COMMA as usize].as_str()),
            ("!", ",</w>")
        );
    }

    #[test]
    fn word_by_word_is_as_the_whole_text() {
        let tokenizer = Tokenizer::new();
        // Marks that compose, letters whose case depends on their neighbours, other white space,
        // special tokens.
        let pieces = [
            "a",
            "Cat's",
            " ",
            "\t",
            "\n",
            "\r\n",
            "  ",
            "\u{a0}",
            "\u{3000}",
            "\u{2028}",
            "\u{85}",
            "\u{200b}",
            "\u{b}",
            "e",
            "\u{301}",
            "\u{338}",
            "\u{327}",
            "ΌΔΟΣ",
            "Σ",
            "İ",
            "'",
            "'s",
            "'LL",
            "re",
            "12",
            ",",
            "!!",
            "<|endoftext|>",
            "<|startof",
            "text|>",
            "日本語",
            "🙂",
            "\u{200d}",
            "ﬁ",
            "Ǆ",
            "가",
            "\u{1100}",
            "\u{1161}",
            "\0",
            "－",
        ];
        let mut rng = Rng::keyed(7, Purpose::Prompt, &[]);
        for _ in 0..20_000 {
            let num_pieces = rng.below(9);
            let text: String = (0..num_pieces)
                .map(|_| pieces[rng.below(pieces.len() as u64) as usize])
                .collect();
            assert_eq!(tokenizer.ids(&text), tokenizer.encode(&text), "{text:?}");
        }
    }

    #[test]
    fn chunks_are_framed_and_padded() {
        let tokenizer = Tokenizer::new();
        let chunks = tokenizer.chunks("A cat!");
        let start = [BOS, 320, 2368, 256, EOS];
        assert_eq!((chunks.clip_l.len(), chunks.clip_g.len()), (1, 1));
        assert_eq!(
            (&chunks.clip_l[0][..5], &chunks.clip_g[0][..5]),
            (&start[..], &start[..])
        );
        assert!(chunks.clip_l[0][5..].iter().all(|&id| id == EOS));
        assert!(chunks.clip_g[0][5..].iter().all(|&id| id == 0));
        let empty = tokenizer.chunks("");
        assert_eq!(empty.clip_g, [empty_chunk(Clip::G)]);
        assert_eq!((empty.clip_l.len(), empty.clip_l[0][0]), (1, BOS));
        assert!(empty.clip_l[0][1..].iter().all(|&id| id == EOS));
    }

    #[test]
    fn text_is_cut_every_75_tokens_and_dropped_after_three_chunks() {
        let tokenizer = Tokenizer::new();
        for (num_words, num_chunks) in [
            (0, 1),
            (1, 1),
            (75, 1),
            (76, 2),
            (150, 2),
            (151, 3),
            (225, 3),
            (226, 3),
            (999, 3),
        ] {
            let text = "cat ".repeat(num_words);
            let chunks = tokenizer.chunks(&text);
            assert_eq!(
                (chunks.clip_l.len(), tokenizer.num_chunks(&text, Cut::Plain)),
                (num_chunks, num_chunks)
            );
            // Each word is one token; those beyond three chunks are dropped.
            let num_cats = chunks
                .clip_l
                .iter()
                .flatten()
                .filter(|&&id| id == 2368)
                .count();
            assert_eq!(num_cats, num_words.min(225), "{num_words} words");
            assert!(
                chunks
                    .clip_g
                    .iter()
                    .all(|chunk| chunk[0] == BOS && chunk.contains(&EOS))
            );
        }
    }

    #[test]
    fn comma_cut_moves_what_follows_the_last_near_comma() {
        let (word, comma) = (2368, COMMA);
        let text = |commas: &[usize], len: usize| {
            (0..len)
                .map(|i| if commas.contains(&i) { comma } else { word })
                .collect()
        };
        let lengths = |ids: Vec<u32>| {
            pieces(&ids, Cut::Comma)
                .iter()
                .map(|piece| piece.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(lengths(text(&[60], 80)), [61, 19]);
        assert_eq!(lengths(text(&[60, 70], 80)), [71, 9]);
        // A comma can be the last of 75 tokens; 20 back is found, 21 is not; one that begins the
        // next chunk prevents the move.
        assert_eq!(lengths(text(&[74], 80)), [75, 5]);
        assert_eq!(lengths(text(&[55], 80)), [56, 24]);
        assert_eq!(lengths(text(&[54], 80)), [75, 5]);
        assert_eq!(lengths(text(&[60, 75], 80)), [75, 5]);
        assert_eq!(lengths(text(&[60], 75)), [75]);
        assert_eq!(lengths(Vec::new()), [0]);
        assert_eq!(
            lengths(text(&(0..300).collect::<Vec<_>>(), 300)),
            [75, 75, 75]
        );
    }

    #[test]
    fn folders_name_their_padding() {
        for (which, padding) in [(Clip::L, EOS_TEXT), (Clip::G, "!")] {
            let files = tokenizer_files(which);
            assert_eq!(
                files.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
                [
                    "vocab.json",
                    "merges.txt",
                    "tokenizer_config.json",
                    "special_tokens_map.json"
                ]
            );
            let vocab: Value = serde_json::from_slice(&files[0].1).unwrap();
            assert_eq!(vocab[padding], which.padding());
            for (_, bytes) in &files[2..] {
                let config: Value = serde_json::from_slice(bytes).unwrap();
                assert_eq!(config["pad_token"], padding);
            }
        }
    }
}
