package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import java.io.FileInputStream
import java.io.IOException
import java.nio.file.Files
import java.nio.file.attribute.FileTime
import java.util.concurrent.TimeUnit

private const val RECORD = "checked-files.json"
private const val RECORD_VERSION = 1

/** A file that was written so shortly before it is read may be written again with the same times: clocks have steps. */
private const val SETTLED_NANOSECONDS = 2_000_000_000L

/** What differs after a file was changed or copied; the time of the last change of anything cannot be set by programs. */
private const val STATE = "unix:size,lastModifiedTime,ctime,ino,dev"

/**
 * The name of a file whose sha256 is not the manifest's; null if all have theirs.
 *
 * A file is not read if it was found right before, and its size, its times of change, and its place on the disk are those
 * that it had then. What was found is kept in a device's folder, as far as it can be written.
 *
 * @param device the folder, of this bundle on this device; null keeps nothing, and all files are read.
 * @param verify whether to read every file.
 * @param settled nanoseconds that a file must not have been written for before the check, to be kept as right.
 * @throws InputError a file cannot be read.
 */
internal fun firstChangedFile(
    bundle: File,
    manifest: Manifest,
    device: File?,
    verify: Boolean = false,
    progress: Progress = Progress { _, _ -> },
    settled: Long = SETTLED_NANOSECONDS,
): String? {
    val record = device?.let { File(it, RECORD) }
    val known = if (verify || record == null) emptyMap() else recorded(record, manifest)
    val found = LinkedHashMap<String, List<Long>>()
    val begun = System.currentTimeMillis() * 1_000_000
    for ((name, metadata) in manifest.files) {
        val file = File(bundle, name)
        try {
            if (name !in known) flush(file)
            val before = state(file)
            if (before != null && known[name] == before) progress.done(name, metadata.size)
            else if (fileSha256(file, progress) != metadata.sha256) return name
            // Also not while it changed: then it has another state now.
            if (before != null && state(file) == before && before.subList(1, 3).max() < begun - settled) found[name] = before
        } catch (error: IOException) {
            throw InputError("$file: cannot be read (${error.message}); copy the bundle again", error)
        }
    }
    if (record != null && found != known) keep(record, manifest, found)
    return null
}

/** Write a file's changes in memory to the disk: until then, programs that map it change it at the same times. */
private fun flush(file: File) {
    try {
        FileInputStream(file).use { it.fd.sync() }
    } catch (_: IOException) { // a disk that is read only; what cannot be read is found later
    }
}

/** Size, times in nanoseconds, and the place on the disk; null where the system does not tell them. */
private fun state(file: File): List<Long>? = try {
    val found = Files.readAttributes(file.toPath(), STATE)
    listOf("size", "lastModifiedTime", "ctime", "ino", "dev").map {
        when (val value = found.getValue(it)) {
            is FileTime -> value.to(TimeUnit.NANOSECONDS)
            else -> (value as Number).toLong()
        }
    }
} catch (_: UnsupportedOperationException) {
    null
} catch (_: IllegalArgumentException) {
    null
}

/** States of files that were found right; none if the record is missing, damaged, or another bundle's. */
private fun recorded(record: File, manifest: Manifest): Map<String, List<Long>> = try {
    val document = JsonParser.parseString(record.readText()).asJsonObject
    val isOurs = document["version"].asInt == RECORD_VERSION && document["bundle"].asString == manifest.digest
    if (!isOurs) emptyMap()
    else document["files"].asJsonObject.asMap().mapValues { (_, state) -> state.asJsonArray.map { it.asLong } }
} catch (_: IOException) {
    emptyMap()
} catch (_: RuntimeException) { // whatever a damaged file holds
    emptyMap()
}

private fun keep(record: File, manifest: Manifest, found: Map<String, List<Long>>) {
    val document = JsonObject().apply {
        addProperty("version", RECORD_VERSION)
        addProperty("bundle", manifest.digest)
        add("files", JsonObject().apply { found.forEach { (name, state) -> add(name, numbers(state)) } })
    }
    try {
        record.parentFile.mkdirs()
        writeWhole(record) { it.write(document.toString().toByteArray()) }
    } catch (_: IOException) { // no room: files are read again next time
    }
}

private fun numbers(state: List<Long>) = JsonArray().apply { state.forEach { add(it) } }
