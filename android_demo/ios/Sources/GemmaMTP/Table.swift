// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/tables.py.
import Foundation

/// An embedding table, whose rows are read from mapped files and converted to float32.
public final class Table {
    public let columns: Int

    private let metadata: TableMetadata
    private let file: String
    private let data: MappedRows
    private let scales: MappedRows?

    /// Bits of a number; unsigned integers stand for themselves minus half of their range.
    private static let bits = ["float32": 32, "int8": 8, "uint8": 8, "uint4": 4, "uint3": 3, "uint2": 2]
    private static let scaleBytes = ["float32": 4, "float16": 2, "bfloat16": 2]

    /// - Throws: `InputError` if the encoding is unknown or the files are too short for the table.
    public init(bundle: URL, metadata: TableMetadata) throws {
        self.metadata = metadata
        columns = metadata.columns
        file = bundle.path
        let groups = (metadata.columns + metadata.groupSize - 1) / metadata.groupSize
        guard let bits = Table.bits[metadata.encoding], metadata.rowBytes * 8 >= metadata.columns * bits else {
            throw InputError("\(file): a table's rows are too short for its columns; export the bundle again")
        }
        data = try MappedRows(bundle: bundle, rows: metadata.data, count: metadata.rows, rowBytes: metadata.rowBytes)
        guard metadata.encoding != "float32" else {
            scales = nil
            return
        }
        guard let rows = metadata.scales, let bytes = Table.scaleBytes[rows.dtype ?? ""] else {
            throw InputError("\(file): a table's scales are missing; export the bundle again")
        }
        scales = try MappedRows(bundle: bundle, rows: rows, count: metadata.rows, rowBytes: groups * bytes)
    }

    /// Returns the rows of T token ids, `[T, columns]`; throws `InputError` for an id beyond the table.
    public func rows(_ ids: [Int]) throws -> [Float] {
        var numbers: [Float] = []
        numbers.reserveCapacity(ids.count * columns)
        for id in ids {
            guard id >= 0, id < metadata.rows else {
                throw InputError("\(file): has \(metadata.rows) rows, token \(id) was chosen; export it again")
            }
            appendRow(id, to: &numbers)
        }
        return numbers
    }

    private func appendRow(_ id: Int, to numbers: inout [Float]) {
        data.withRow(id) { row in
            if metadata.encoding == "float32" {
                for i in 0..<columns {
                    numbers.append(Float(bitPattern: row.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)))
                }
                return
            }
            let bits = Table.bits[metadata.encoding]!
            for i in 0..<columns {
                numbers.append(number(row, i, bits) * scale(id, group: i / metadata.groupSize))
            }
        }
    }

    /// Number `i` of a row, without its scale: it begins at bit `i * bits` of the little-endian stream.
    private func number(_ row: UnsafeRawBufferPointer, _ i: Int, _ bits: Int) -> Float {
        if metadata.encoding == "int8" {
            return Float(Int8(bitPattern: row[i]))
        }
        let first = i * bits
        var value = Int(row[first / 8]) >> (first % 8)
        if first % 8 + bits > 8 {
            value |= Int(row[first / 8 + 1]) << (8 - first % 8)
        }
        return Float((value & ((1 << bits) - 1)) - (1 << (bits - 1)))
    }

    private func scale(_ id: Int, group: Int) -> Float {
        guard let scales else { return 1 }
        return scales.withRow(id) { row in
            switch metadata.scales?.dtype {
            case "float16":
                return halfToFloat(row.loadUnaligned(fromByteOffset: 2 * group, as: UInt16.self))
            case "bfloat16":
                return Float(bitPattern: UInt32(row.loadUnaligned(fromByteOffset: 2 * group, as: UInt16.self)) << 16)
            default:
                return Float(bitPattern: row.loadUnaligned(fromByteOffset: 4 * group, as: UInt32.self))
            }
        }
    }
}

/// Rows of bytes in one or several mapped files.
private struct MappedRows {
    private struct Piece {
        let first: Int
        let end: Int
        let offset: Int
        let data: Data
    }

    private let pieces: [Piece]
    private let rowBytes: Int

    /// - Throws: `InputError` if a file is too short, or the parts do not have all rows.
    init(bundle: URL, rows: Rows, count: Int, rowBytes: Int) throws {
        var start = 0
        self.rowBytes = rowBytes
        guard count > 0, rowBytes > 0 else {
            throw InputError("\(bundle.path): a table has no rows; export the bundle again")
        }
        pieces = try rows.parts.map { part in
            let path = bundle.appendingPathComponent(part.file)
            let data = try Data(contentsOf: path, options: .alwaysMapped)
            let first = start, rows = part.rows ?? count
            guard rows >= 1, rows <= count - first, part.offset >= 0,
                  (data.count - part.offset) / rowBytes >= rows
            else {
                throw InputError("\(path.path): too short for its rows of a table; export the bundle again")
            }
            start += rows
            return Piece(first: first, end: start, offset: part.offset, data: data)
        }
        guard start == count else {
            throw InputError("\(bundle.path): the parts of a table do not have its rows; export the bundle again")
        }
    }

    func withRow<Result>(_ row: Int, _ body: (UnsafeRawBufferPointer) -> Result) -> Result {
        let piece = pieces.first { row < $0.end }!
        return piece.data.withUnsafeBytes { bytes in
            body(UnsafeRawBufferPointer(rebasing: bytes[(piece.offset + (row - piece.first) * rowBytes)...]))
        }
    }
}

/// Converts the bits of a float16; Swift's own type is missing on Intel Macs.
func halfToFloat(_ half: UInt16) -> Float {
    let exponent = Int(half >> 10 & 31), fraction = Float(half & 1023)
    let size: Float
    switch exponent {
    case 0: size = fraction * Float(sign: .plus, exponent: -24, significand: 1)
    case 31: size = fraction == 0 ? .infinity : .nan
    default: size = (1024 + fraction) * Float(sign: .plus, exponent: exponent - 25, significand: 1)
    }
    return half >> 15 == 0 ? size : -size
}
