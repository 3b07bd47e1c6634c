//! Who may look: on this machine everybody who names it as such, from elsewhere those with a token.
//!
//! A web site that a browser has open could let its own name point to 127.0.0.1 and read the page.
//! Without a token, requests are therefore answered only under a name of this machine.

use std::{fs::File, io::Read, net::IpAddr};

use axum::http::{HeaderMap, Uri, header};

/// The rule for requests.
#[derive(Debug)]
pub(crate) enum Access {
    /// Requests under a name of this machine.
    Loopback,
    /// Requests with the token.
    Token(Token),
}

/// A secret of 128 bits, in hexadecimal digits.
#[derive(Debug)]
pub(crate) struct Token {
    text: String,
    /// The cookie's name. Cookies belong to a host, not to a port.
    cookie: String,
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is answered.
    Granted,
    /// It is answered with a cookie and the address without the token.
    WithCookie(String),
    /// It is refused.
    Denied(&'static str),
}

impl Token {
    /// A new token for the server at a port.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub(crate) fn new(port: u16) -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let text = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let cookie = format!("rectiflow-watch-{port}");
        Ok(Self { text, cookie })
    }

    /// The token, for the address that is printed.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Whether it is the token; takes the same time whatever is wrong with it.
    fn is(&self, found: &str) -> bool {
        // Hashes are compared in constant time.
        blake3::hash(found.as_bytes()) == blake3::hash(self.text.as_bytes())
    }

    fn is_in_cookies(&self, headers: &HeaderMap) -> bool {
        for line in headers.get_all(header::COOKIE) {
            for pair in line.to_str().unwrap_or_default().split(';') {
                if let Some((name, value)) = pair.trim().split_once('=')
                    && name == self.cookie
                    && self.is(value)
                {
                    return true;
                }
            }
        }
        false
    }

    fn is_in_query(&self, uri: &Uri) -> bool {
        let mut pairs = uri.query().unwrap_or_default().split('&');
        pairs.any(|pair| {
            pair.strip_prefix("token=")
                .is_some_and(|found| self.is(found))
        })
    }
}

impl Access {
    /// Returns what becomes of a request.
    pub(crate) fn check(&self, uri: &Uri, headers: &HeaderMap) -> Verdict {
        match self {
            Self::Loopback if is_local(headers) => Verdict::Granted,
            Self::Loopback => Verdict::Denied(
                "this page is served to this machine alone: open it as localhost or 127.0.0.1",
            ),
            Self::Token(token) if token.is_in_cookies(headers) => Verdict::Granted,
            Self::Token(token) if token.is_in_query(uri) => Verdict::WithCookie(format!(
                "{}={}; Path=/; HttpOnly; SameSite=Strict",
                token.cookie, token.text
            )),
            Self::Token(_) => Verdict::Denied(
                "the token is missing or wrong: open the address that `rectiflow watch` \
                 has printed",
            ),
        }
    }
}

/// Whether a request names this machine as itself.
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let Some(host) = host else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).expect("a header"));
        headers
    }

    #[test]
    fn without_a_token_only_names_of_this_machine_are_answered() {
        let check = |host| {
            let found =
                Access::Loopback.check(&Uri::from_static("/"), &headers(header::HOST, host));
            found == Verdict::Granted
        };
        for host in [
            "localhost",
            "localhost:8471",
            "LOCALHOST:1",
            "127.0.0.1:8471",
            "127.1.2.3",
            "[::1]:8471",
        ] {
            assert!(check(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8471",
            "localhost.evil.example",
            "10.0.0.1",
            "",
            ":",
            "127.0.0.1.evil.example",
        ] {
            assert!(!check(host), "{host}");
        }
        let none = Access::Loopback.check(&Uri::from_static("/"), &HeaderMap::new());
        assert!(matches!(none, Verdict::Denied(_)));
    }

    #[test]
    fn a_token_is_taken_from_the_address_once_and_then_from_the_cookie() {
        let token = Token::new(8471).expect("random numbers");
        let text = token.text().to_owned();
        assert_eq!(text.len(), 32);
        assert_ne!(Token::new(8471).expect("random numbers").text(), text);
        let access = Access::Token(token);
        let uri = |query: &str| format!("/?{query}").parse::<Uri>().expect("an address");
        let none = HeaderMap::new();

        let verdict = access.check(&uri(&format!("a=b&token={text}")), &none);
        let Verdict::WithCookie(cookie) = verdict else {
            panic!("{verdict:?}")
        };
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        let pair = cookie.split(';').next().expect("a pair");
        let with_cookie = headers(header::COOKIE, &format!("other=1; {pair}"));
        assert_eq!(access.check(&uri(""), &with_cookie), Verdict::Granted);

        let longer = format!("token={text}0");
        let shorter = format!("token={}", &text[1..]);
        for query in ["", "token=", &longer, &shorter, "token=%00"] {
            let verdict = access.check(&uri(query), &none);
            assert!(matches!(verdict, Verdict::Denied(_)), "{query}");
        }
        let other = headers(header::COOKIE, &format!("rectiflow-watch-1={text}"));
        assert!(matches!(access.check(&uri(""), &other), Verdict::Denied(_)));
    }
}
