// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/tables.py.
import Foundation

/// An embedding table, whose rows are read from mapped files and converted to float32.
public final class Table {
    public let columns: Int

    private let metadata: TableMetadata
    private let file: String
    private let data: Data
    private let scales: Data?

    /// Bits of a number; unsigned integers stand for themselves minus half of their range.
    private static let bits = ["float32": 32, "int8": 8, "uint8": 8, "uint4": 4, "uint3": 3, "uint2": 2]
    private static let scaleBytes = ["float32": 4, "float16": 2, "bfloat16": 2]

    /// - Throws: `InputError` if the encoding is unknown or the files are too short for the table.
    public init(bundle: URL, metadata: TableMetadata) throws {
        self.metadata = metadata
        columns = metadata.columns
        file = bundle.appendingPathComponent(metadata.data.file).path
        data = try Data(contentsOf: bundle.appendingPathComponent(metadata.data.file), options: .alwaysMapped)
        scales = try metadata.scales.map {
            try Data(contentsOf: bundle.appendingPathComponent($0.file), options: .alwaysMapped)
        }
        let groups = (metadata.columns + metadata.groupSize - 1) / metadata.groupSize
        guard let bits = Table.bits[metadata.encoding], metadata.rowBytes * 8 >= metadata.columns * bits,
              metadata.data.offset + metadata.rows * metadata.rowBytes <= data.count
        else {
            throw InputError("\(file): too short for the table that the manifest describes; export the bundle again")
        }
        guard metadata.encoding != "float32" else { return }
        guard let place = metadata.scales, let bytes = Table.scaleBytes[place.dtype ?? ""],
              place.offset + metadata.rows * groups * bytes <= scales?.count ?? 0
        else {
            throw InputError("\(file): the table's scales are missing or too short; export the bundle again")
        }
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
        let groups = (columns + metadata.groupSize - 1) / metadata.groupSize
        data.withUnsafeBytes { bytes in
            let row = UnsafeRawBufferPointer(rebasing: bytes[(metadata.data.offset + id * metadata.rowBytes)...])
            if metadata.encoding == "float32" {
                for i in 0..<columns {
                    numbers.append(Float(bitPattern: row.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)))
                }
                return
            }
            let bits = Table.bits[metadata.encoding]!
            for i in 0..<columns {
                numbers.append(number(row, i, bits) * scale(id * groups + i / metadata.groupSize))
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

    private func scale(_ i: Int) -> Float {
        guard let scales, let place = metadata.scales else { return 1 }
        return scales.withUnsafeBytes { bytes in
            switch place.dtype {
            case "float16":
                return halfToFloat(bytes.loadUnaligned(fromByteOffset: place.offset + 2 * i, as: UInt16.self))
            case "bfloat16":
                let half = bytes.loadUnaligned(fromByteOffset: place.offset + 2 * i, as: UInt16.self)
                return Float(bitPattern: UInt32(half) << 16)
            default:
                return Float(bitPattern: bytes.loadUnaligned(fromByteOffset: place.offset + 4 * i, as: UInt32.self))
            }
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
