//! The page: text, style and script, a few files of this program that need nothing from elsewhere.

/// The document.
pub(crate) const HTML: &str = include_str!("page.html");
/// Its style.
pub(crate) const CSS: &str = include_str!("page.css");
/// The script that draws charts.
pub(crate) const CHARTS_JS: &str = include_str!("charts.js");
/// The script of the page.
pub(crate) const JS: &str = include_str!("page.js");
/// Its icon.
pub(crate) const ICON: &str = include_str!("icon.svg");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_loads_nothing_from_elsewhere_and_never_parses_data_as_markup() {
        let whole = [HTML, CSS, CHARTS_JS, JS, ICON];
        let len: usize = whole.iter().map(|text| text.len()).sum();
        assert!(len < 200_000, "{len} bytes");
        for text in whole {
            for word in [
                "https:",
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "@import",
                "//cdn",
            ] {
                assert!(!text.contains(word), "{word}");
            }
            let addresses = text.matches("http:").count();
            let namespaces = text.matches("http://www.w3.org/2000/svg").count();
            assert_eq!(addresses, namespaces);
        }
    }
}
