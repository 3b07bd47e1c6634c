//! The time of an event: the time of day while a run goes on, and what its events say afterwards.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::measure::metrics::Event;

/// Says when events happen; the time never goes back.
#[derive(Debug)]
pub(super) struct Clock {
    unix_secs: f64,
    is_past: bool,
}

impl Clock {
    pub(super) fn new(is_past: bool) -> Self {
        Self {
            unix_secs: 0.0,
            is_past,
        }
    }

    /// Moves to an event; returns its time, in seconds since 1970.
    pub(super) fn pass(&mut self, event: &Event) -> f64 {
        if !self.is_past {
            return self.now();
        }
        match event {
            Event::Start(start) => self.unix_secs = self.unix_secs.max(start.unix_secs as f64),
            Event::Step(step) => self.unix_secs += step.secs.max(0.0),
            Event::Test(test) => self.unix_secs += test.secs.max(0.0),
            Event::Preview { secs, .. } => self.unix_secs += secs.max(0.0),
            _ => {}
        }
        self.unix_secs
    }

    /// Returns the time, in seconds since 1970.
    pub(super) fn now(&mut self) -> f64 {
        if !self.is_past
            && let Ok(time) = SystemTime::now().duration_since(UNIX_EPOCH)
        {
            self.unix_secs = self.unix_secs.max(time.as_secs_f64());
        }
        self.unix_secs
    }
}

/// The last second of the year 9999.
const LAST: u64 = 253_402_300_799;

/// A date of the Gregorian calendar and a time of day, in UTC.
struct Date {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

/// The date of a time from 1970 to 9999. The calendar is counted in eras of 400 years, and in years
/// that begin in March, so that the day that leap years add is their last one.
fn date(unix_secs: u64) -> Date {
    const DAYS_OF_ERA: u64 = 146_097;
    let unix_secs = unix_secs.min(LAST);
    // Days since the first of March of the year 0.
    let days = unix_secs / 86_400 + 719_468;
    let (era, day_of_era) = (days / DAYS_OF_ERA, days % DAYS_OF_ERA);
    let leap_days = day_of_era / 1460 + day_of_era / 146_096 - day_of_era / 36_524;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months from March on alternate between 31 and 30 days, five at a time.
    let months = (5 * day_of_year + 2) / 153;
    let month = if months < 10 { months + 3 } else { months - 9 };
    Date {
        year: 400 * era + year_of_era + u64::from(month <= 2),
        month,
        day: day_of_year - (153 * months + 2) / 5 + 1,
        hour: unix_secs / 3600 % 24,
        minute: unix_secs / 60 % 60,
        second: unix_secs % 60,
    }
}

/// Returns a time as Python's `datetime.isoformat` writes it: `2026-11-30T19:38:04.174846+00:00`.
pub(super) fn iso(unix_secs: f64) -> String {
    let micros = (unix_secs.clamp(0.0, LAST as f64) * 1e6) as u64;
    let Date {
        year,
        month,
        day,
        hour,
        minute,
        second,
    } = date(micros / 1_000_000);
    let micros = micros % 1_000_000;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}+00:00")
}

/// Returns a time as names of folders have it: `20261130_193804`.
pub(super) fn stamp(unix_secs: u64) -> String {
    let Date {
        year,
        month,
        day,
        hour,
        minute,
        second,
    } = date(unix_secs);
    format!("{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checked against Python's `datetime.fromtimestamp(secs, timezone.utc)`.
    #[test]
    fn dates_are_those_of_the_calendar() {
        let known = [
            (0, "19700101_000000"),
            (951_782_399, "20000228_235959"),
            (951_782_400, "20000229_000000"),
            (951_868_800, "20000301_000000"),
            (1_709_164_800, "20240229_000000"),
            (1_796_067_484, "20261130_193804"),
            (4_107_542_400, "21000301_000000"),
            (LAST, "99991231_235959"),
            (u64::MAX, "99991231_235959"),
        ];
        for (unix_secs, expected) in known {
            assert_eq!(stamp(unix_secs), expected);
        }
        assert_eq!(iso(1_796_067_484.25), "2026-11-30T19:38:04.250000+00:00");
        assert_eq!(iso(f64::NAN), "1970-01-01T00:00:00.000000+00:00");
    }

    #[test]
    fn the_time_of_the_past_is_that_of_its_events() {
        let event = |text: &str| -> Event { serde_json::from_str(text).expect("an event") };
        let start = event(
            r#"{"event":"start","step":0,"unix_secs":1000,"order_hash":"7","num_parameters":1,
            "num_train":1,"num_test":1,"buckets":[],"threads":1}"#,
        );
        let preview = event(r#"{"event":"preview","step":1,"name":"a.png","secs":2.5}"#);
        let mut clock = Clock::new(true);
        assert_eq!(clock.pass(&start), 1000.0);
        assert_eq!(clock.pass(&preview), 1002.5);
        assert_eq!(clock.pass(&start), 1002.5, "it never goes back");
        assert!(Clock::new(false).pass(&start) > 1.7e9);
    }
}
