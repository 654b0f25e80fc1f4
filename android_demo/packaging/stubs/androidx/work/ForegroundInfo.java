package androidx.work;

import android.app.Notification;

public final class ForegroundInfo {
    public ForegroundInfo(int notificationId, Notification notification, int foregroundServiceType) {}
}
