//! What is wrong with a file that is no safetensors file, in words that suggest a remedy. Pure.

use safetensors::SafeTensorError;

use crate::error::counted;

/// Largest length of a tensor's name, in bytes: SDXL's longest has 87. Messages contain names.
const MAX_NAME_BYTES: usize = 512;

/// Recognises, by its first bytes, a file of a kind often taken for a safetensors file.
pub(crate) fn something_else(bytes: &[u8]) -> Option<&'static str> {
    // A safetensors file begins with the length of its header, whose bytes can be these, but a
    // brace follows.
    let is_pickle = matches!(bytes, [0x80, 2..=5, ..]) && bytes.get(8) != Some(&b'{');
    if bytes.starts_with(b"PK\x03\x04") || is_pickle {
        return Some(
            "this is a pickle (.ckpt, .pt, .bin), which can run code when it is opened; convert \
             it to safetensors with a tool you trust",
        );
    }
    if bytes.starts_with(b"GGUF") {
        return Some(
            "this is a GGUF file, whose weights are quantised; use the safetensors file it was \
             made from",
        );
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Some("this is a Git LFS pointer, not the file it points to; run `git lfs pull`");
    }
    let is_page = bytes.len() > 9 && bytes[..9].eq_ignore_ascii_case(b"<!doctype")
        || bytes.starts_with(b"<html");
    is_page.then_some("this is a web page: the download failed; repeat it")
}

/// Returns the parser's error about a header, in words that suggest a remedy.
pub(crate) fn explained(error: &SafeTensorError, bytes: &[u8]) -> String {
    let found = bytes.len();
    match error {
        SafeTensorError::HeaderTooSmall => {
            format!(
                "the file ends after {}, inside its header",
                counted(found, "byte")
            )
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            let length = bytes
                .first_chunk()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes));
            format!(
                "its first 8 bytes declare a header of {length} bytes, the file has {found}: it \
                 is truncated or no safetensors file"
            )
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!(
                "the file has {}, which is not what its header declares: it is truncated, copy it \
                 again",
                counted(found, "byte")
            )
        }
        // Only the JSON parser's message can be long: it quotes the input.
        error => error
            .to_string()
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(300)
            .collect(),
    }
}

/// Checks a name, because names appear in messages: a hostile one could forge log lines or fill a
/// screen.
pub(crate) fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "a tensor's name has {} bytes, more than {MAX_NAME_BYTES}",
            name.len()
        ));
    }
    if name.chars().any(char::is_control) {
        return Err(format!(
            "the name {name:?} of a tensor contains control characters"
        ));
    }
    Ok(())
}
