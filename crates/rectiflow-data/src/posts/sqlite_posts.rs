//! Posts in an SQLite file: one of its tables, in the order of its rows.
//!
//! The file is opened for reading alone. `NOT INDEXED` makes SQLite read the table itself: an index
//! with the wanted columns would return its rows in another order than a second reading with more
//! columns.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, types::ValueRef};
use serde_json::Value;

use crate::{
    filter::columns::{Columns, Kind},
    posts::{
        fields::{Row, Shape},
        rows::{Rows, listed},
    },
    text_file,
};

/// The first bytes of an SQLite file.
pub(crate) const SQLITE_MAGIC: &[u8] = b"SQLite format 3\0";
/// Names of the table of posts if a file has several that could be it.
const POSTS: [&str; 2] = ["posts", "post"];

/// The columns of the table of posts.
///
/// # Errors
/// Why it cannot be read.
pub(crate) fn columns(path: &Path) -> Result<Columns, String> {
    let connection = open(path)?;
    let table = posts(&connection)?;
    columns_of(&connection, &table)
}

/// Reads the columns `wanted` of the rows.
///
/// # Errors
/// Why it, or the rest of it, cannot be read.
pub(crate) fn read(path: &Path, wanted: &[String], rows: &mut dyn Rows) -> Result<(), String> {
    let connection = open(path)?;
    let table = posts(&connection)?;
    let mut names = Vec::new();
    for (name, _) in declared(&connection, &table)? {
        if wanted.contains(&name.to_lowercase()) {
            names.push(name);
        }
    }
    let list: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    let sql = format!(
        "SELECT {} FROM {} NOT INDEXED",
        list.join(", "),
        quoted(&table)
    );
    let mut statement = connection.prepare(&sql).map_err(broken)?;
    let mut found = statement.query([]).map_err(broken)?;
    for number in 0..u32::MAX {
        let Some(record) = found.next().map_err(broken)? else {
            return Ok(());
        };
        if !rows.wants(number) {
            continue;
        }
        let mut row = Row::new();
        for (index, name) in names.iter().enumerate() {
            let value = value_of(record.get_ref(index).map_err(broken)?);
            if !value.is_null() {
                row.insert(name.to_lowercase(), value);
            }
        }
        rows.take(number, Ok(row))?;
    }
    Err(format!("it has more than {} rows", u32::MAX))
}

fn open(path: &Path) -> Result<Connection, String> {
    // SQLite would wait for the other end of a pipe.
    text_file::open_regular(path).map_err(|error| error.to_string())?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(broken)?;
    // A file can bring views and functions of its own along.
    let trusted = connection.pragma_update(None, "trusted_schema", false);
    trusted.map_err(broken)?;
    Ok(connection)
}

fn broken(error: rusqlite::Error) -> String {
    format!("not an SQLite file that can be read: {error}")
}

/// A name inside of SQL.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The table of posts.
fn posts(connection: &Connection) -> Result<String, String> {
    let sql = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name";
    let mut statement = connection.prepare(sql).map_err(broken)?;
    let names = statement.query_map([], |row| row.get::<_, String>(0));
    let mut tables = Vec::new();
    let mut described = Vec::new();
    for name in names.map_err(broken)? {
        let name = name.map_err(broken)?;
        let columns = columns_of(connection, &name)?;
        let shape = Shape::of(&columns);
        described.push(format!("{name} ({})", listed(columns.names())));
        if (shape.has_key || shape.has_files) && (shape.has_tags || shape.has_captions) {
            tables.push(name);
        }
    }
    let is_usual = |name: &&String| POSTS.iter().any(|post| name.eq_ignore_ascii_case(post));
    match &tables[..] {
        [table] => Ok(table.clone()),
        [] => Err(format!(
            "none of its tables has posts: expected a table with a column id or md5 and columns \
             such as tag_string_general; its tables: {}",
            described.join("; ")
        )),
        several => several.iter().find(is_usual).cloned().ok_or_else(|| {
            format!(
                "several of its tables could have posts, {}: name the one that is meant posts, or \
                 write it to a file of its own",
                several.join(", ")
            )
        }),
    }
}

fn columns_of(connection: &Connection, table: &str) -> Result<Columns, String> {
    let mut columns = Columns::default();
    for (name, kind) in declared(connection, table)? {
        columns.add(&name, kind);
    }
    Ok(columns)
}

/// The columns of a table as they are declared.
fn declared(connection: &Connection, table: &str) -> Result<Vec<(String, Kind)>, String> {
    let sql = "SELECT name, type FROM pragma_table_info(?1)";
    let mut statement = connection.prepare(sql).map_err(broken)?;
    let found = statement.query_map([table], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    });
    let mut columns = Vec::new();
    for column in found.map_err(broken)? {
        let (name, declared) = column.map_err(broken)?;
        columns.push((name, kind_of(&declared)));
    }
    Ok(columns)
}

/// The kind of values that a declared type prefers. SQLite puts any value anywhere.
fn kind_of(declared: &str) -> Kind {
    let declared = declared.to_uppercase();
    let has = |parts: &[&str]| parts.iter().any(|part| declared.contains(part));
    if has(&["BOOL"]) {
        Kind::Flag
    } else if has(&["INT", "REAL", "FLOA", "DOUB", "NUM", "DEC"]) {
        Kind::Number
    } else if has(&["CHAR", "CLOB", "TEXT", "STR", "DATE", "TIME"]) {
        Kind::Text
    } else if has(&["JSON"]) {
        Kind::List
    } else {
        Kind::Any
    }
}

fn value_of(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => number.into(),
        ValueRef::Real(number) => number.into(),
        ValueRef::Text(text) => of_text(&String::from_utf8_lossy(text)),
        // A hash can be 16 bytes.
        ValueRef::Blob(bytes) => match <[u8; 16]>::try_from(bytes) {
            Ok(hash) => format!("{:032x}", u128::from_be_bytes(hash)).into(),
            Err(_) => Value::Null,
        },
    }
}

/// A text, or the list or object that it is the JSON of.
fn of_text(text: &str) -> Value {
    if text.starts_with(['[', '{'])
        && let Ok(value) = serde_json::from_str::<Value>(text)
    {
        return value;
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_sqlite_are_values_of_json() {
        assert_eq!(value_of(ValueRef::Integer(5)), 5);
        assert_eq!(value_of(ValueRef::Text(b"[x_x]")), "[x_x]");
        assert_eq!(
            value_of(ValueRef::Text(b"[\"a\"]")),
            serde_json::json!(["a"])
        );
        let hash = value_of(ValueRef::Blob(&[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
        ]));
        assert_eq!(hash, "000102030405060708090a0b0c0d0e0f");
        assert!(value_of(ValueRef::Blob(b"x")).is_null());
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
    }

    #[test]
    fn declared_types_have_kinds() {
        for (declared, kind) in [
            ("INTEGER", Kind::Number),
            ("boolean", Kind::Flag),
            ("VARCHAR(32)", Kind::Text),
            ("DATETIME", Kind::Text),
            ("", Kind::Any),
            ("JSON", Kind::List),
        ] {
            assert_eq!(kind_of(declared), kind, "{declared}");
        }
    }
}
