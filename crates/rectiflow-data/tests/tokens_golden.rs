//! Token ids against Hugging Face's fast CLIP tokenizer (`scripts/golden/tokens.py`).

use std::io::Read;

use rectiflow_data::token::{BOS, CHUNK_TOKENS, EOS, Tokenizer};

const GOLDEN: &[u8] = include_bytes!("golden/tokens.jsonl.gz");

#[test]
fn ids_are_those_of_the_fast_tokenizer() {
    let mut text = String::new();
    flate2::read::GzDecoder::new(GOLDEN)
        .read_to_string(&mut text)
        .unwrap();
    let tokenizer = Tokenizer::new();
    let mut num_captions = 0;
    // Not lines(): captions hold U+0085 and U+2028 unescaped, but no bare line feed.
    for line in text.split_terminator('\n') {
        let (caption, expected): (String, Vec<i64>) = serde_json::from_str(line).unwrap();
        assert_eq!((expected[0], *expected.last().unwrap()), (BOS, EOS));
        let expected = &expected[1..expected.len() - 1];
        let found: Vec<i64> = tokenizer.ids(&caption).into_iter().map(i64::from).collect();
        assert_eq!(found, expected, "{caption:?}");
        let chunks = tokenizer.chunks(&caption);
        let mut pieces: Vec<&[i64]> = expected.chunks(CHUNK_TOKENS).take(3).collect();
        if pieces.is_empty() {
            pieces.push(&[]);
        }
        assert_eq!(chunks.clip_l.len(), pieces.len(), "{caption:?}");
        for (chunk, piece) in chunks.clip_l.iter().zip(pieces) {
            assert_eq!(&chunk[1..=piece.len()], piece, "{caption:?}");
        }
        num_captions += 1;
    }
    assert_eq!(num_captions, 2400);
}
