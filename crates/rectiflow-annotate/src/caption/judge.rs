//! Whether an answer is a caption: not empty, not cut, no refusal, no loop. Pure.

use rectiflow_data::annotation::Status;

/// Beginnings of answers that decline, in lower case, apostrophes straight.
const REFUSALS: [&str; 30] = [
    "i'm sorry",
    "i am sorry",
    "sorry, ",
    "sorry but",
    "i apologize",
    "my apologies",
    "i can't",
    "i cannot",
    "i can not",
    "i could not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i'm not comfortable",
    "i won't",
    "i will not",
    "i must decline",
    "i must respectfully decline",
    "i do not feel comfortable",
    "i don't feel comfortable",
    "i'm here to help, but",
    "as an ai",
    "as a language model",
    "as a large language model",
    "unfortunately, i",
    "unfortunately i",
    "this request violates",
    "the request violates",
    "it is not appropriate",
];

/// Parts of answers by models that were shown no picture, in lower case.
const BLIND: [&str; 16] = [
    "i don't see any image",
    "i don't see an image",
    "i do not see any image",
    "i don't see a picture",
    "i don't see any picture",
    "i can't see any image",
    "i can't see the image",
    "i cannot see any image",
    "i cannot see the image",
    "i can't view image",
    "i cannot view image",
    "i'm unable to view image",
    "no image was provided",
    "no image has been provided",
    "please provide the image",
    "please upload the image",
];

/// Characters at the beginning of an answer that are looked at for refusals.
const OPENING_CHARS: usize = 300;
/// Most words of a block whose repetition is found.
const LONGEST_BLOCK: usize = 40;
/// Words that the repetitions of a block must cover.
const REPEATED_WORDS: usize = 12;
/// Words of the n-grams that are counted, and how many n-grams there must be.
const GRAM_WORDS: usize = 4;
const LEAST_GRAMS: usize = 40;
/// Share of the n-grams that must differ.
const LEAST_DISTINCT: f64 = 0.5;
/// The same character in a row.
const LONGEST_RUN: usize = 60;

/// A verdict that an answer cannot be used: the status and the reason.
pub type Verdict = (Status, String);

/// What a server says about an answer beside its text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ending<'a> {
    /// Why the answer ends, such as "stop" or "length".
    pub finish: &'a str,
    /// The server's own word for a refusal.
    pub refusal: Option<&'a str>,
}

/// Judges an answer. None if it can be used. `more` are beginnings of refusals beside the built-in
/// ones.
pub fn judge(text: &str, ending: Ending<'_>, more: &[String]) -> Option<Verdict> {
    if let Some(reason) = refusal(text, ending, more) {
        return Some((Status::Refused, reason));
    }
    if let Some(reason) = repetition(text) {
        return Some((Status::Loop, reason));
    }
    if ending.finish == "length" {
        let reason = "it reached max_tokens".to_owned();
        return Some((Status::Cut, reason));
    }
    if !text.chars().any(char::is_alphanumeric) {
        let reason = match text.trim() {
            "" => "the answer has no text".to_owned(),
            _ => "the answer has no letter".to_owned(),
        };
        return Some((Status::Empty, reason));
    }
    None
}

/// Whether an answer says that there is no picture.
pub fn sees_nothing(text: &str) -> bool {
    let opening = plain(text);
    BLIND.iter().any(|part| opening.contains(part))
}

fn refusal(text: &str, ending: Ending<'_>, more: &[String]) -> Option<String> {
    if let Some(reason) = ending.refusal {
        return Some(format!("the server says: {}", shortened(reason)));
    }
    if ending.finish == "content_filter" {
        return Some("the server's filter removed it".to_owned());
    }
    let opening = plain(text);
    if let Some(part) = BLIND.iter().find(|part| opening.contains(*part)) {
        return Some(format!("it says that it sees no picture: \"{part}\""));
    }
    let mut beginnings = REFUSALS
        .iter()
        .copied()
        .chain(more.iter().map(String::as_str));
    let found = beginnings.find(|beginning| opening.starts_with(beginning))?;
    Some(format!("it begins with \"{}\"", found.trim()))
}

/// The beginning of a text in lower case, with straight apostrophes and no signs before it.
fn plain(text: &str) -> String {
    let text = text.trim_start_matches(|sign: char| !sign.is_alphanumeric());
    let opening: String = text.chars().take(OPENING_CHARS).collect();
    opening
        .to_lowercase()
        .replace(['\u{2019}', '\u{2018}'], "'")
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(200).collect();
    if short.len() < text.len() {
        short += "...";
    }
    short.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What an answer repeats. None if it does not.
fn repetition(text: &str) -> Option<String> {
    let mut run = (' ', 0);
    for sign in text.chars().filter(|sign| !sign.is_whitespace()) {
        run = if sign == run.0 {
            (sign, run.1 + 1)
        } else {
            (sign, 1)
        };
        if run.1 >= LONGEST_RUN {
            return Some(format!("{sign:?} {LONGEST_RUN} times in a row"));
        }
    }
    let words = words(text);
    if let Some((start, len, times)) = repeated_block(&words) {
        let block = words[start..start + len].join(" ");
        return Some(format!("\"{}\" {times} times in a row", shortened(&block)));
    }
    let num_grams = words.len().checked_sub(GRAM_WORDS - 1)?;
    if num_grams < LEAST_GRAMS {
        return None;
    }
    let grams: std::collections::HashSet<&[String]> = words.windows(GRAM_WORDS).collect();
    let share = grams.len() as f64 / num_grams as f64;
    (share < LEAST_DISTINCT).then(|| {
        let percent = (100.0 * share).round();
        format!("only {percent}% of its {num_grams} sequences of {GRAM_WORDS} words differ")
    })
}

/// The words of a text in lower case, without signs; of scripts without spaces its characters.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let mut words: Vec<String> = Vec::new();
    for word in lower.split(|sign: char| !sign.is_alphanumeric()) {
        if !word.is_empty() {
            words.push(word.to_owned());
        }
    }
    let num_chars: usize = words.iter().map(|word| word.chars().count()).sum();
    if num_chars <= 12 * words.len() {
        return words;
    }
    lower
        .chars()
        .filter(|sign| sign.is_alphanumeric())
        .map(String::from)
        .collect()
}

/// A block of words that follows itself: where it begins, its words, and how often it is there. The
/// repetitions must cover [`REPEATED_WORDS`], and be at least four, or three of a block of four
/// words or more.
fn repeated_block(words: &[String]) -> Option<(usize, usize, usize)> {
    for len in 1..=LONGEST_BLOCK.min(words.len() / 3) {
        let least = if len < 4 { 4 } else { 3 };
        // Words that equal the one a block before, in a row.
        let mut same = 0;
        for at in len..words.len() {
            same = if words[at] == words[at - len] {
                same + 1
            } else {
                0
            };
            let times = same / len + 1;
            if times >= least && times * len >= REPEATED_WORDS {
                return Some((at + 1 - times * len, len, times));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(text: &str, finish: &str) -> Option<Status> {
        let ending = Ending {
            finish,
            refusal: None,
        };
        judge(text, ending, &["no comment".to_owned()]).map(|(status, _)| status)
    }

    #[test]
    fn captions_are_captions() {
        for text in [
            "A cat on a mat.",
            "A sorry sight: a wet dog, very very very very tired, in the rain.",
            "Two people, two chairs, two tables and two lamps in a room; two more wait outside.",
            "I can't believe",
            "1girl, solo, long hair, blue eyes, blue hair, blue dress, blue sky, blue sea",
            "\u{732b}\u{304c}\u{30de}\u{30c3}\u{30c8}\u{306e}\u{4e0a}\u{306b}\u{3044}\u{308b}",
            "No, no, no, no, no, no: a sign says it six times.",
        ] {
            let expected = text.starts_with("I can't").then_some(Status::Refused);
            assert_eq!(status(text, "stop"), expected, "{text}");
        }
        // A long caption whose sentences begin alike.
        let mut long = String::new();
        for (number, thing) in ["cup", "book", "pen", "key", "shoe", "hat"]
            .iter()
            .enumerate()
        {
            long += &format!("On shelf {number} there is a {thing} of its own colour. ");
        }
        assert_eq!(status(&long, "stop"), None);
    }

    #[test]
    fn faults_are_told_apart() {
        for (text, finish, expected) in [
            ("", "stop", Status::Empty),
            (" \n", "stop", Status::Empty),
            ("...", "stop", Status::Empty),
            ("A cat on", "length", Status::Cut),
            ("", "length", Status::Cut),
            ("A cat", "content_filter", Status::Refused),
            (
                "I\u{2019}m sorry, but I can't help with that.",
                "stop",
                Status::Refused,
            ),
            ("**I cannot** describe people.", "stop", Status::Refused),
            (
                "As an AI language model, I have no eyes.",
                "stop",
                Status::Refused,
            ),
            ("No comment.", "stop", Status::Refused),
            ("It seems no image was provided.", "stop", Status::Refused),
        ] {
            assert_eq!(status(text, finish), Some(expected), "{text}");
        }
        let ending = Ending {
            finish: "stop",
            refusal: Some("not  this\none"),
        };
        let (status, reason) = judge("", ending, &[]).unwrap();
        assert_eq!(
            (status, reason.as_str()),
            (Status::Refused, "the server says: not this one")
        );
    }

    #[test]
    fn loops_are_found_in_words_blocks_and_signs() {
        let block = "a red hat and a blue coat ";
        for (text, part) in [
            ("blue ".repeat(12), "\"blue\" 12 times"),
            ("very very ".repeat(6), "\"very\" 12 times"),
            (
                format!("A dog. {}", block.repeat(3)),
                "\"a red hat and a blue coat\" 3 times",
            ),
            ("-".repeat(70), "'-' 60 times"),
            ("\u{732b}\u{3068}\u{72ac}".repeat(9), "4 times"),
        ] {
            let (status, reason) = judge(&text, Ending::default(), &[]).unwrap();
            assert_eq!(status, Status::Loop, "{text}");
            assert!(reason.contains(part), "{reason}");
        }
        // Sentences that return in another order.
        let sentences = [
            "The sky is blue today. ",
            "The sea is green below. ",
            "A man walks by. ",
        ];
        let mut text = String::new();
        for number in 0..24_usize {
            text += sentences[number * number % 3];
            text += sentences[(number / 3) % 3];
        }
        assert_eq!(
            judge(&text, Ending::default(), &[]).unwrap().0,
            Status::Loop
        );
        // A loop that reaches the limit is a loop, which another seed mends sooner than a cut.
        assert_eq!(
            self::status(&"blue ".repeat(50), "length"),
            Some(Status::Loop)
        );
    }

    #[test]
    fn a_model_that_sees_nothing_says_so() {
        assert!(sees_nothing("I don\u{2019}t see any image attached."));
        assert!(!sees_nothing("An image of a cat."));
    }
}
